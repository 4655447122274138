"""From a measurement to a quota: what `python -m harness recalibrate` does, step by step.

`command` has its flags, `session` the order of its steps, `progress` what a killed one leaves behind, and `inforce` the
service whose quotas are to change. What becomes of the proposal there is the service's own business
(docs/recalibration.md).
"""
