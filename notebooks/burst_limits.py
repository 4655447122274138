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
# # How large a burst meets the SLO?
#
# Bursts of requests, all intended at one instant, level after level. A level PASSES when at most 5 % of its requests
# are proven to be slow, FAILS when more are, and is INCONCLUSIVE in between. Nothing above a level that did not pass is
# ever claimed to pass, so a limit is claimed too high in at most 5 % of searches.

# %%
from harness.analysis import bursts_shown, display
from harness.evaluation import load

# %% tags=["parameters"]
samples: list[str] = []  # folders of sample sets; none: the newest one in data/samples
slo_file: str = "data/slo.yaml"  # the SLOs
partial: bool = False  # judge also sets that were cut short

# %%
evaluation = load(samples, slo_file, partial=partial)

# %%
bursts_shown.conclusion(evaluation.data, evaluation.findings)

# %% [markdown]
# ## Every trial
#
# Above, a mark is one burst at its own p95, counted from the instant of the burst; failures count as slower than
# anything and stand at the upper edge. Below, the bar is what the level proves about the share of slow requests: the
# burst is the unit, not the request, for the requests of one burst share its fate.

# %%
bursts_shown.strips(evaluation.data)

# %% [markdown]
# ## Level by level
#
# A level that is clear halfway gets no more trials; small bursts get more, so that there are enough requests. *More
# trials* is how many further ones like these would settle an open level.

# %%
bursts_shown.levels(evaluation.data)

# %% [markdown]
# ## What was measured

# %%
display.measurements(evaluation.data)

# %%
display.limitations(evaluation.data)
