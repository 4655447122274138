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
# # What happened during the load?
#
# When each request was sent, how long it took, where its time went, and what the machine did meanwhile.

# %%
from harness.analysis import display, figures
from harness.evaluation import load

# %% tags=["parameters"]
samples: list[str] = []  # folders of sample sets; none: the newest one in data/samples
slo_file: str = "data/slo.yaml"  # the SLOs
partial: bool = False  # judge also sets that were cut short
baseline: str = ""  # a sample set, or a folder that holds some, to compare with; none: nothing is compared
slowest: int = 10  # how many of the slowest requests to list

# %%
evaluation = load(samples, slo_file, partial=partial, baseline=baseline)

# %%
display.conclusion(evaluation.verdicts, evaluation.findings)

# %% [markdown]
# ## What became of the runs
#
# Completion is seen by polling, so it is no more exact than the poll interval; the service's own clock stands beside.

# %%
display.runs(evaluation.data)

# %% [markdown]
# ## When requests waited

# %%
figures.latency_over_time(evaluation.data)

# %% [markdown]
# ## What the machine did meanwhile

# %%
figures.resources(evaluation.data)

# %% [markdown]
# ## Where the time went
#
# The service says with every response how long it spent on what; the rest is network, HTTP and the client itself.

# %%
figures.server_timing(evaluation.data)

# %% [markdown]
# ## The slowest requests

# %%
display.slowest(evaluation.data, slowest)

# %% [markdown]
# ## What was measured

# %%
display.measurements(evaluation.data)

# %%
display.limitations(evaluation.data)
