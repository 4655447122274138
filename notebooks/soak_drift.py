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
# # Does latency drift during the soak?
#
# "No drift" is proven, not assumed: PASS means that the level moved by less than the margin, up or down, over the whole
# soak with 95 % confidence on either side. FAIL proves a drift beyond it, and INCONCLUSIVE says how many more minutes
# would settle it.

# %%
from harness.analysis import display, drift_shown, figures
from harness.evaluation import load

# %% tags=["parameters"]
samples: list[str] = []  # folders of sample sets; none: the newest one in data/samples
slo_file: str = "data/slo.yaml"  # the SLOs
partial: bool = False  # judge also sets that were cut short
margin: float = 0.05  # share by which the level may move over the soak

# %%
evaluation = load(samples, slo_file, partial=partial)

# %%
drift_shown.conclusion(evaluation.data, margin, evaluation.findings)

# %% [markdown]
# ## Minute by minute
#
# A mark is the median of one minute, the line is the change that was judged. Minutes resemble their neighbours, so they
# are averaged in nine bins, or six, before anything is concluded from them.

# %%
drift_shown.minutes(evaluation.data, margin)

# %%
drift_shown.verdicts(evaluation.data, margin)

# %% [markdown]
# ## What the machine did meanwhile

# %%
figures.resources(evaluation.data)

# %% [markdown]
# ## What was measured

# %%
display.measurements(evaluation.data)

# %%
display.limitations(evaluation.data)
