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
# # Is it slower than the baseline?
#
# Measurement against measurement, each by its own p50 and p95: a measurement is what repeats independently, its
# requests are not. PASS excludes with 95 % confidence that it is slower by more than the margin of 5 %, FAIL proves a
# slowdown, and INCONCLUSIVE says how many more measurements would settle it.

# %%
from harness.analysis import display, regression_shown
from harness.evaluation import load

# %% tags=["parameters"]
samples: list[str] = []  # folders of sample sets; none: the newest one in data/samples
slo_file: str = "data/slo.yaml"  # the SLOs
partial: bool = False  # judge also sets that were cut short
baseline: str = "data/baselines/smoke"  # a sample set, or a folder that holds some; `make baseline` measures this one

# %%
evaluation = load(samples, slo_file, partial=partial, baseline=baseline)

# %%
regression_shown.conclusion(evaluation.data, evaluation.baseline, evaluation.findings)

# %% [markdown]
# ## How much each quantile changed
#
# A bar wholly left of the dashed line passes; one wholly right of the solid line is a slowdown. The p99 is shown and
# not judged: few measurements carry it.

# %%
regression_shown.changes(evaluation.data, evaluation.baseline)

# %% [markdown]
# ## Every measurement
#
# A mark is one measurement. Where candidate and baseline were measured in turn, each pair is joined and compared
# within itself, which takes out what both met.

# %%
regression_shown.measurements(evaluation.data, evaluation.baseline)

# %%
regression_shown.comparisons(evaluation.data, evaluation.baseline)

# %% [markdown]
# ## What was measured

# %%
display.measurements(evaluation.data)

# %%
display.limitations(evaluation.data)
