"""What a caller may say of samples beside seeds and classes, checked against a model's sections."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal, NoReturn, TypeVar, get_args

import torch
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from tessera.errors import TesseraError
from tessera.precision import autocast, resolve
from tessera.recipes.messages import describe
from tessera.recipes.overrides import merge
from tessera.recipes.schema import (
    SAMPLERS,
    DenoisingSamplerSection,
    SamplerConfig,
    Section,
)
from tessera.recipes.text import read_yaml

Precision = Literal["auto", "fp32", "bf16"]
Output = Literal["numpy", "pil", "tensor", "samples"]
OUTPUTS: tuple[Output, ...] = get_args(Output)
AnySection = TypeVar("AnySection", bound=Section)


@dataclass(frozen=True)
class Option:
    """One option of a model, for people who ask what there is.

    Attributes:
        section: what it belongs to.
        name: as it is given, `name=value`.
        value: without being given.
        meaning: in a few words; "" where the name says all.
        annotation: its type, with what its values must be as `Annotated` has it.
    """

    section: str
    name: str
    value: Any
    meaning: str
    annotation: Any = Any


def listed(title: str, section: Section) -> Iterator[Option]:
    """The options of a section."""
    for name in _names(type(section)):
        field = type(section).model_fields[name]
        value, meaning = getattr(section, name), field.description or ""
        if isinstance(value, dict) and value:
            yield from (Option(title, f"{name}.{k}", v, meaning) for k, v in value.items())
        elif isinstance(value, Section):
            yield Option(title, f"{name}.kind", getattr(value, "kind", None), meaning, str)
            for option in listed(title, value):
                yield replace(option, name=f"{name}.{option.name}")
        else:
            yield Option(title, name, value, meaning, _whole_type(field))


def _whole_type(field: FieldInfo) -> Any:
    """The type of a field with its checks, which Pydantic keeps beside it."""
    made: Any = field.annotation
    for check in field.metadata:
        made = Annotated[made, check]
    return made


def choose_sampler(section: SamplerConfig, wanted: str | None) -> SamplerConfig:
    """The recipe's sampler, or another kind of sampler with its own defaults.

    Raises:
        TesseraError: there is none of that kind.
    """
    if wanted is None or wanted == section.kind:
        return section
    known = samplers(section)
    if wanted not in known:
        raise TesseraError(
            f"`sampler={wanted}`: there is none for this model. Choose {', '.join(known)}"
        )
    return known[wanted]()


def samplers(section: SamplerConfig) -> dict[str, type[SamplerConfig]]:
    """Those that sample from the same kind of model, by name."""
    return {kind: other for kind, other in SAMPLERS.items() if other.family == section.family}


def fill(
    sections: Mapping[str, Section], given: Mapping[str, Any], refused: Mapping[str, str]
) -> dict[str, Section]:
    """The sections with the given values, each put where its name belongs.

    Args:
        sections: what the model takes, with its defaults; no name occurs in two of them.
        given: name to value, which may be text; parts of a nested section as `levels.steps`. Text
            for an `options.NAME` of an external part, whose type is not known, is YAML.
        refused: names that other models take, and the message that says why this one does not.

    Raises:
        TesseraError: a name is unknown or refused, or a value is one that it cannot have.
    """
    homes = {name: key for key, section in sections.items() for name in _names(type(section))}
    values: dict[str, dict[str, Any]] = {key: {} for key in sections}
    for name, value in given.items():
        first, *rest = name.split(".")
        if first not in homes:
            _refuse(name, [*homes, "sampler"], refused)
        _put(values[homes[first]], [first, *rest], value)
    return {key: _changed(section, values[key]) for key, section in sections.items()}


def _names(section: type[Section]) -> list[str]:
    """Names of the options, those of its own before those that all such sections have."""
    own = [name for name in section.__annotations__ if name in section.model_fields]
    return [n for n in dict.fromkeys([*own, *section.model_fields]) if n != "kind"]


def divide_options(
    takes: Mapping[str, Collection[str]], given: Mapping[str, Any], absent: Collection[str] = ()
) -> dict[str, dict[str, Any]]:
    """Options of several models, each put where its name belongs.

    Args:
        takes: the models by name, with the names of the options that each takes.
        given: name to value, behind a model's name and a dot where others take it, too; or a
            model's name to a mapping of its options.
        absent: names of models that take nothing in this call.

    Raises:
        TesseraError: an option that no model takes, or several do; or one of an absent model.
    """
    values: dict[str, dict[str, Any]] = {name: {} for name in takes}
    for name, value in given.items():
        first, _, rest = name.partition(".")
        if first in absent:
            raise TesseraError(
                f"`{name}`: {first} does not run here. Leave the option out, or change `stages` or "
                "`start_from`"
            )
        if first in takes:
            whole = not rest and isinstance(value, Mapping)
            values[first].update(value if whole else {rest: value})
            continue
        homes = [model for model, own in takes.items() if first in own]
        if len(homes) > 1:
            shown = ", ".join(f"{model}.{name}=..." for model in homes[:-1])
            raise TesseraError(
                f"`{name}`: {' and '.join(homes)} both take it. Say whose: {shown} or "
                f"{homes[-1]}.{name}=..."
            )
        if not homes:
            _refuse(name, [f"{model}.{n}" for model, own in takes.items() for n in own], {})
        values[homes[0]][name] = value
    return values


def _put(values: dict[str, Any], path: list[str], value: Any) -> None:
    if "options" in path[:-1] and isinstance(value, str):
        value = read_yaml(value, ".".join(path))
    for part in path[:-1]:
        values = values.setdefault(part, {})
    values[path[-1]] = value


def _refuse(name: str, known: list[str], refused: Mapping[str, str]) -> NoReturn:
    if name in refused:
        raise TesseraError(refused[name])
    near = difflib.get_close_matches(name, known, 1)
    there = ", ".join(f"`{option}`" for option in known)
    hint = f"Did you mean `{near[0]}`?" if near else f"There are {there}"
    raise TesseraError(f"this model has no option `{name}`. {hint}")


def _changed(section: AnySection, values: Mapping[str, Any]) -> AnySection:
    if not values:
        return section
    before = section.model_dump()
    if isinstance(section, DenoisingSamplerSection) and values.get("levels") is not None:
        # Other noise levels take the place of those that the recipe gives the sampler.
        before = {k: v for k, v in before.items() if k not in section.OWN_LEVELS}
    merged = merge(before, values)
    try:
        return type(section).model_validate(merged)
    except ValidationError as error:
        first = error.errors()[0]
        nested = first["loc"] and isinstance(values.get(str(first["loc"][0])), Mapping)
        if nested or first["type"].startswith("model_"):
            text = describe(error, merged, type(section))
            raise TesseraError(text.splitlines()[0]) from error
        where = ".".join(map(str, first["loc"]))
        message = first["msg"].removeprefix("Value error, ")
        raise TesseraError(
            f"`{where}={first['input']}`: {message.lower()}" if where else message
        ) from error


def foreign_sampler_options(section: SamplerConfig) -> dict[str, str]:
    """Names that other samplers take, and what to do to use them."""
    own = type(section).model_fields
    external = "; an own sampler has it as options.{}, if at all" if "options" in own else ""
    owners: dict[str, list[str]] = {}
    for kind, other in samplers(section).items():
        for name in _names(other):
            if name not in own and kind != "external":
                owners.setdefault(name, []).append(f"`sampler={kind}`")
    return {
        name: f"the sampler {section.kind} has no option `{name}`. It is one of "
        + " and ".join([", ".join(kinds[:-1]), *kinds[-1:]] if kinds[1:] else kinds)
        + external.format(name)
        for name, kinds in owners.items()
    }


def check_batch(batch: int) -> None:
    """Check that `batch` images can be made at once.

    Raises:
        TesseraError: it is less than 1.
    """
    if batch < 1:
        raise TesseraError(f"`batch={batch}`: give at least 1 image at once")


def check_output(output: str) -> None:
    """Check that `Pipeline.sample` knows this form of images.

    Raises:
        TesseraError: it does not.
    """
    if output not in OUTPUTS:
        raise TesseraError(f"`output={output}`: there is none. Choose {', '.join(OUTPUTS)}")


def autocast_for(device: torch.device, precision: Precision) -> torch.autocast:
    """The context in which the network computes in `precision`.

    Raises:
        TesseraError: there is no such precision.
    """
    if precision not in ("auto", "fp32", "bf16"):
        raise TesseraError(f"`precision={precision}`: there is none. Choose auto, fp32 or bf16")
    # Tensors without data, on which costs are counted, know no autocast.
    return autocast(
        torch.device("cpu") if device.type == "meta" else device, resolve(precision, device)
    )
