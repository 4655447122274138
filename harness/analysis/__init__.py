"""Turns samples into verdicts. Tables in, tables out: nothing here opens a file, a socket or a clock.

Reading order: `dataset` (what is judged), `validity` (may it be judged at all), `dependence` (how many independent
requests it is worth), `quantiles` and `means` (what it proves, with bounds), `throughput` and `completion` (what a
run's record proves), `drift`, `regression` and `history` (what changed: during a soak, against a baseline, over
reports), `warmup` and `scalability`, `quotas` (what follows for the limits), `slo` (Slo and Verdict), `judges` (which
judge answers which SLO), then what a person sees: `tables`, `figures` and `display`.
"""
