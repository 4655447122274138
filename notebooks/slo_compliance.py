# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Are the SLOs met?
#
# Each SLO of the file is judged on the samples of its load: PASS and FAIL are proven with 95 % confidence each,
# INCONCLUSIVE says how many more samples would settle it, NOT APPLICABLE is about a load that was not measured.

# %%
from harness.analysis import display, figures
from harness.evaluation import load

# %% tags=["parameters"]
samples: list[str] = []  # folders of sample sets; none: the newest one in data/samples
slo_file: str = "data/slo.yaml"  # the SLOs
partial: bool = False  # judge also sets that were cut short
baseline: str = ""  # a sample set, or a folder that holds some, to compare with; none: nothing is compared

# %%
evaluation = load(samples, slo_file, partial=partial, baseline=baseline)

# %%
display.conclusion(evaluation.verdicts, evaluation.findings)

# %%
display.verdicts(evaluation.verdicts)

# %% [markdown]
# ## How near each SLO is
#
# The bar is the interval on which the verdict rests. A bar wholly left of the line passes, wholly right of it fails.
# For a p95 it is the share of slow requests, beside the share that is allowed.

# %%
figures.limits_used(evaluation.verdicts)

# %% [markdown]
# ## What callers waited
#
# From the moment a request was due to its last byte, failures counted as slower than anything. The tail is stretched,
# so that p99 has as much room as p90. An interval is given only where the effective sample size, how many independent
# requests would say as much, can carry one; it is another for each quantile.

# %%
figures.percentiles(evaluation.data, evaluation.slos)

# %%
display.latencies(evaluation.data)

# %% [markdown]
# ## What failed

# %%
display.failures(evaluation.data)

# %% [markdown]
# ## What was measured

# %%
display.measurements(evaluation.data)

# %%
display.limitations(evaluation.data)
