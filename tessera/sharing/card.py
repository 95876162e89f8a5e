"""The model card: a README.md with what the hub and its visitors want to know of a pipeline."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from tessera._version import __version__
from tessera.errors import TesseraError
from tessera.files import split_hub_id
from tessera.pipelines.base import Pipeline
from tessera.pipelines.labels import shortened
from tessera.progress import human
from tessera.recipes.parts import external
from tessera.recipes.schema import Recipe
from tessera.recipes.text import write_yaml
from tessera.sharing.portable import last_name, portable_recipe
from tessera.sharing.scores import ScoreTable

CARD, PICTURE = "README.md", "samples.png"
OTHER = "other"
_NO_LICENCE = (
    "Nobody has named a licence. Weights that were converted from a released checkpoint keep the "
    "licence of their authors."
)


def model_card(
    pipe: Pipeline,
    repository: str,
    *,
    licence: str | None = None,
    scores: Sequence[ScoreTable] = (),
    pictures: int = 0,
    with_codec: bool = False,
) -> str:
    """A README.md with the hub's front matter.

    Args:
        repository: user/name on the hub.
        licence: the hub's name of it; None for "other", with a note.
        scores: tables of them.
        pictures: images in the sample grid, of the seeds from 0 on; 0 without a grid.
        with_codec: the autoencoder of a model of latents goes along.
    """
    recipe = pipe.recipe
    sections = [
        f"# {repository.split('/')[1]}",
        recipe.description,
        _grid(repository, pictures) if pictures else "",
        "## How to load\n\n" + _loading(repository, recipe),
        "## Model\n\n" + _table(_model(pipe)),
        "## Data\n\n" + _table([*_data(pipe), *_codec(recipe, with_codec)]),
        "## Cost\n\n" + _cost(pipe),
        "## Scores\n\n" + ("\n\n".join(map(_scores, scores)) or "None were measured."),
        f"## Recipe\n\n```yaml\n{write_yaml(portable_recipe(recipe))}```",
        "## Licence\n\n" + (_NO_LICENCE if licence is None else f"`{licence}`"),
    ]
    return _front_matter(pipe, licence) + "\n" + "\n\n".join(filter(None, sections)) + "\n"


def _front_matter(pipe: Pipeline, licence: str | None) -> str:
    kinds = dict.fromkeys((pipe.kind, pipe.recipe.network.kind, pipe.recipe.objective.kind))
    values = {
        "license": licence or OTHER,
        "library_name": "tessera",
        "pipeline_tag": "unconditional-image-generation",
        "tags": ["tessera", "image-generation", *(kind.replace("_", "-") for kind in kinds)],
    }
    return f"---\n{write_yaml(values)}---\n"


def _grid(repository: str, pictures: int) -> str:
    seeds = "0" if pictures == 1 else f"0-{pictures - 1}"
    return (
        f"![samples]({PICTURE})\n\n"
        f"Not chosen: `tessera sample {repository} --seeds {seeds} --out samples/` makes these."
    )


def _loading(repository: str, recipe: Recipe) -> str:
    parts = external(recipe)
    own = ""
    if parts:
        own = (
            f"\n\nIt has parts that are not in it ({', '.join(parts)}): hand them over, by "
            "`--with MODULE` or `parts=`."
        )
    return (
        "By tessera with its extra `hub`:\n\n"
        f"```sh\ntessera sample {repository} --seeds 0-15 --out samples/\n```\n\n"
        f'```python\nimport tessera\n\npipe = tessera.load("{repository}", revision="main")\n'
        "images = pipe.sample(range(16))  # uint8 [16, H, W, C]\n```\n\n"
        f"A commit's hash in the place of `main`, or `{repository}@HASH` in any command, is always "
        "the same model. Its weights are safetensors, and loading executes nothing. Written by "
        f"tessera {__version__}.{own}"
    )


def _model(pipe: Pipeline) -> list[tuple[str, str]]:
    recipe = pipe.recipe
    seen = f"{pipe.images_seen:,}" if pipe.images_seen else "not known"
    return [
        ("kind", pipe.kind),
        ("network", recipe.network.kind),
        ("parameters", f"{sum(p.numel() for p in pipe.model.parameters()):,}"),
        ("averages of the weights", ", ".join(pipe.emas)),
        ("images seen in training", seen),
        ("sampler", recipe.sampling.kind),
    ]


def _data(pipe: Pipeline) -> list[tuple[str, str]]:
    """What the recipe says of the images; of their place, its name only."""
    recipe, data = pipe.recipe, pipe.recipe.data
    names = pipe.class_names
    classes = str(data.num_classes or "none")
    rows = [
        ("set", last_name(data.path) if data.path else "not known"),
        ("resolution", f"{data.resolution} x {data.resolution}, {data.channels} channels"),
        ("classes", f"{classes}: {shortened(names)}" if names else classes),
    ]
    if not recipe.codec.of_pixels:
        channels, side, _ = recipe.shape
        rows.append(("modelled as", f"latents of a VAE, {side} x {side}, {channels} channels"))
    if data.xflip:
        rows.append(("mirrored copies", "yes"))
    if data.max_images is not None:
        rows.append(("random subset", f"{data.max_images:,} images"))
    if data.held_out is not None:
        rows.append(("held out", f"{data.held_out:.1%}"))
    return rows


def _codec(recipe: Recipe, along: bool) -> list[tuple[str, str]]:
    """Where the autoencoder of a model of latents is, and at which revision."""
    model = getattr(recipe.codec, "model", None)
    if model is None:
        return []
    if along:
        return [("autoencoder", f"{last_name(model)}, in the folder `codec`")]
    repository, revision = split_hub_id(model)
    at = f"at the revision `{revision}`" if revision else "its newest: the recipe names no revision"
    return [("autoencoder", f"`{repository}` on the hub, {at}")]


def _cost(pipe: Pipeline) -> str:
    try:
        cost, stages = pipe.cost(), pipe.costs()
    except TesseraError:
        return "It cannot be counted: the model has parts of its user's own."
    rows = [
        ("one evaluation of the network", human(cost.forward_flops, "FLOP")),
        (
            "sampling, an image",
            f"{human(cost.sample_flops, 'FLOP')}, {cost.evaluations} evaluations",
        ),
        ("training, an image", human(cost.train_flops, "FLOP")),
    ]
    if pipe.images_seen and not stages:
        total = human(cost.train_flops * pipe.images_seen, "FLOP")
        rows.append(("training, all", f"{total}, {pipe.images_seen:,} images"))
    rows += [
        (
            f"sampling, {name}",
            f"{human(stage.sample_flops, 'FLOP')}, {stage.evaluations} evaluations",
        )
        for name, stage in stages.items()
    ]
    return _table(rows) + "\n\nA multiply-add counts as two; sampling with the recipe's options."


def _scores(table: ScoreTable) -> str:
    head = ("score", "value", "as", "rule")
    return f"{table.title}.\n\n" + _table(table.rows, head)


def _table(rows: Iterable[Sequence[str]], head: Sequence[str] = ("", "")) -> str:
    """A table of Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(_cell(cell) for cell in line)} |" for line in lines)


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())
