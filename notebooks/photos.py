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
# # From a folder of photographs to samples
#
# Look at a folder, plan, train, sample, judge, load again: `docs/tutorial.md` does the same with
# commands. As a notebook: `jupytext --to notebook notebooks/photos.py`; as a program:
# `python notebooks/photos.py`.

# %% tags=["parameters"]
PHOTOS = "photos"  # a folder or an archive of images; sub-folders are classes
MINUTES = 10.0  # of training; on two cores of a processor colours are there after ten, shapes later
RUN = None  # the run folder; None takes runs/photos-001, or the next number that is free
CHANGES: list[str] = []  # what you want otherwise, such as ["data.resolution=64"]
SAMPLES = 32

# %%
import numpy as np

import tessera
from tessera.images import grid, to_pil
from tessera.starting import plan_training

# %% [markdown]
# ## A look, and a plan
#
# Every image is looked at once. Resolution, network, batch and length follow from the images, from
# what a step takes on this machine, and from the minutes; the table says why. Nothing is converted
# yet.

# %%
plan = plan_training(PHOTOS, MINUTES, CHANGES)
plan

# %% [markdown]
# ## Training
#
# The images are converted, once. The button that interrupts ends the training after its step, and
# saves it: `tessera.train(resume=run.run_dir)` goes on, also tomorrow.

# %%
run = tessera.train(plan, dir=RUN)
run

# %% [markdown]
# ## Samples
#
# The same seed gives the same image in any batch. Seed and class of an image stand under the
# pointer.

# %%
pipe = run.pipeline
pipe

# %%
label = "balanced" if pipe.model.num_classes else None
samples = pipe.sample(range(SAMPLES), label, output="samples")
samples

# %%
samples.save(str(run.run_dir / "grid.png"))

# %% [markdown]
# What else this model takes, such as `steps`, `solver` and `guidance`: `help(pipe.sample)`.

# %%
pipe.sample(range(8), label, steps=6, output="samples")

# %% [markdown]
# ## How they come about
#
# From left to right: what the network takes the image to be, from noise alone to the end.

# %%
estimates: list[np.ndarray] = []
pipe.sample(
    range(4), label, on_step=lambda seeds, state: estimates.append(pipe.to_pixels(state.denoised))
)
chosen = np.unique(np.linspace(0, len(estimates) - 1, 8).round().astype(int))
strips = np.stack([estimates[step] for step in chosen], axis=1)
to_pil(grid(strips.reshape(-1, *strips.shape[2:]), columns=len(chosen)))

# %% [markdown]
# ## How good are they?
#
# The report says how far the samples are from real images, beside what other real images reach and
# what blurred ones do; and whether they are copies of training images.

# %%
run.page()

# %% [markdown]
# ## Load it again
#
# The run folder is all that is needed; `tessera push` shares it.

# %%
again = tessera.load(run.run_dir)
bool((again.sample([0], label) == pipe.sample([0], label)).all())
