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
# # What may one tenant use?
#
# A quota is a share of what the system was *shown* to carry: of the lower 95 % bound of its stable throughput, not of
# the figure measured, which is too high half of the time. Stable is the highest rate at which latency, errors and
# queues were all shown to stay within their bounds. What was not measured well enough keeps the value in force.

# %%
from harness.analysis import bursts_shown, display, quotas_shown
from harness.evaluation import load
from harness.quotatable import quota_table

# %% tags=["parameters"]
samples: list[str] = []  # folders of sample sets; none: the newest one in data/samples
slo_file: str = "data/slo.yaml"  # the SLOs
partial: bool = False  # judge also sets that were cut short
fraction: float = 0.25  # share of the proven throughput that one tenant may use
active: str = ""  # file of `quotas show --json`, the table in force; none: revision 1, where that was in force
tenants: list[int] = [5, 10, 20, 50, 100]  # how many there may be
busy_shares: list[float] = [0.01, 0.02, 0.05, 0.1]  # share of the time in which a tenant uses its full quota

# %%
evaluation = load(samples, slo_file, partial=partial)

# %%
table = quota_table(evaluation, fraction, active)

# %%
quotas_shown.conclusion(table)

# %% [markdown]
# ## What is shown, and what follows
#
# The bar is the lower bound of what was served at the highest rate that passed, the ring the mean. The square is what
# one tenant may use, the diamond what is in force.

# %%
quotas_shown.shares(table)

# %% [markdown]
# All rates are per second. *In flight* is the quota as concurrency, a rate times the mean latency there (Little's law),
# for one tenant and at the bound itself. *At once* is what may come after a rest: a second's worth, and no more than
# the same share of the highest burst that met its SLO.

# %%
quotas_shown.quotas(table)

# %% [markdown]
# ## Do all tenants fit?
#
# More tenants than fit at full quota is no fault as long as they are seldom busy together. Each is taken to be busy by
# itself; tenants do surge together, and the probability in brackets counts that: in 1 % of the time, half of them are.

# %%
quotas_shown.oversubscribed(table, tenants, busy_shares)

# %%
quotas_shown.chances(table, tenants, busy_shares)

# %% [markdown]
# ## Which rates were tried

# %%
quotas_shown.rates(table)

# %%
quotas_shown.levels(table)

# %% [markdown]
# ## Which bursts meet the SLO

# %%
bursts_shown.conclusion(evaluation.data, evaluation.findings)

# %% [markdown]
# ## What was measured

# %%
display.measurements(evaluation.data)

# %%
display.limitations(evaluation.data)
