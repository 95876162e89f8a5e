"""What the shell offers after Tab: recipes, keys and values of changes, images; no torch for it."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable, Iterator

import typer

from tessera.errors import TesseraError

Offer = tuple[str, str]
"""What may stand there, and what it is."""

SHELLS = ("bash", "zsh", "fish")

# All ask in one way: the line so far goes in, lines of "value<tab>meaning" come out, which are not
# wrapped. A space follows what is whole; a key waits for its value, a section for its key, a folder
# for a file.
_ASK = (
    "COLUMNS=9999 _TESSERA_COMPLETE=complete_fish _TYPER_COMPLETE_FISH_ACTION=get-args "
    "_TYPER_COMPLETE_ARGS"
)
_BASH = """\
_tessera_completion() {
    local line="${COMP_LINE:0:COMP_POINT}" value meaning cut=""
    local typed="${line##* }"
    # Bash ends words at =, and replaces what stands after it.
    [[ "$COMP_WORDBREAKS" == *=* && "$typed" == *=* ]] && cut="${typed%=*}="
    COMPREPLY=()
    while IFS=$'\\t' read -r value meaning; do
        [[ -n "$value" ]] && COMPREPLY+=("${value#"$cut"}")
    done < <(@ASK@="$line" "${COMP_WORDS[0]}" 2>/dev/null)
    [[ ${#COMPREPLY[@]} -eq 1 && "${COMPREPLY[0]}" == *[=/.] ]] && compopt -o nospace 2>/dev/null
    return 0
}
complete -o bashdefault -o default -F _tessera_completion tessera
"""
_ZSH = """\
#compdef tessera
_tessera_completion() {
    local -a whole open
    local value meaning
    while IFS=$'\\t' read -r value meaning; do
        case "$value" in
            *[=/.]) open+=("${value//:/\\\\:}:$meaning") ;;
            ?*) whole+=("${value//:/\\\\:}:$meaning") ;;
        esac
    done < <(@ASK@="${(j: :)words[1,CURRENT]}" ${words[1]} 2>/dev/null)
    (( $#open )) && _describe -t keys key open -S ''
    (( $#whole )) && _describe -t words word whole
    (( $#open + $#whole )) && return
    [[ "$PREFIX" == *=* ]] && compset -P 1 '*='
    _files
}
compdef _tessera_completion tessera
"""
_FISH = """\
function _tessera_completion
    set -l line (commandline -cp)
    set -l found (env @ASK@="$line" tessera 2>/dev/null | string match -r '.+')
    if test (count $found) -gt 0
        printf '%s\\n' $found
    else
        __fish_complete_path (commandline -ct)
    end
end
complete --command tessera --no-files --arguments '(_tessera_completion)'
"""


def offer_shells(incomplete: str) -> list[str]:
    """The shells."""
    return [*SHELLS]


def completion(
    shell: str = typer.Argument(
        metavar="SHELL", help="bash, zsh or fish.", autocompletion=offer_shells
    ),
) -> None:
    """Print what makes a shell complete commands, recipes, keys and paths of this command.

    echo 'eval "$(tessera completion bash)"' >> ~/.bashrc

    echo 'eval "$(tessera completion zsh)"' >> ~/.zshrc       # after compinit

    echo 'tessera completion fish | source' >> ~/.config/fish/config.fish
    """
    scripts = dict(zip(SHELLS, (_BASH, _ZSH, _FISH), strict=True))
    if shell not in scripts:
        raise TesseraError(f"`shell`: {shell} is not one of {', '.join(SHELLS)}")
    print(scripts[shell].replace("@ASK@", _ASK), end="")


# --------------------------------------------------------------------------------- what is offered


def offer_recipes(incomplete: str) -> Iterator[Offer]:
    """Shipped recipes, files and folders."""
    from tessera.recipes.loading import shipped

    for name, make in shipped().items():
        if name.startswith(incomplete):
            yield name, make().description
    yield from _paths(incomplete)


def offer_changes(incomplete: str) -> Iterator[Offer]:
    """Keys of a recipe by and by, section for section; then their values."""
    yield from _changes(_keys(), incomplete)


def offer_words(incomplete: str) -> Iterator[Offer]:
    """Recipes, paths and keys, where a command takes them in any order."""
    if "=" not in incomplete:
        yield from offer_recipes(incomplete)
    yield from _changes(_keys(), incomplete)


def offer_sampling(incomplete: str) -> Iterator[Offer]:
    """Options of sampling, which are keys of a recipe's section of that name."""
    section, kinds = "sampling.", _keys()["sampling.kind"]
    options = {k.removeprefix(section): v for k, v in _keys().items() if k.startswith(section)}
    del options["kind"]
    yield from _changes({"sampler": kinds, **options}, incomplete)


def offer_sections(incomplete: str) -> Iterator[Offer]:
    """Sections of a recipe."""
    from tessera.recipes.keys import recipe_keys

    found: dict[str, str] = {}
    for entry in recipe_keys():
        found.setdefault(entry.path, entry.meaning)
    return ((path, meaning) for path, meaning in found.items() if path.startswith(incomplete))


@functools.cache
def _keys() -> dict[str, tuple[str, tuple[str, ...]]]:
    """Meaning and known values of each key of any recipe, by its full name."""
    from tessera.recipes.keys import recipe_keys

    found: dict[str, tuple[str, tuple[str, ...]]] = {}
    for entry in recipe_keys():
        place = f"{entry.path}." if entry.path else ""
        if entry.kind:
            _, kinds = found.get(f"{place}kind", ("", ()))
            found[f"{place}kind"] = "which one", (*kinds, entry.kind)
        for key in entry.keys:
            meaning, values = found.get(place + key.name, (key.meaning, ()))
            found[place + key.name] = meaning, tuple(dict.fromkeys((*values, *key.choices)))
    return found


def _changes(keys: dict[str, tuple[str, tuple[str, ...]]], incomplete: str) -> Iterator[Offer]:
    key, sign, typed = incomplete.partition("=")
    if sign:
        _, values = keys.get(key, ("", ()))
        offers: Iterable[Offer] = ((value, "") for value in values) if values else _paths(typed)
        yield from ((f"{key}={value}", meaning) for value, meaning in offers)
        return
    above = incomplete[: incomplete.rfind(".") + 1]
    offered: dict[str, str] = {}
    for name, (meaning, _) in keys.items():
        if name.startswith(incomplete):
            head, dot, _ = name[len(above) :].partition(".")
            offered.setdefault(f"{above}{head}{dot or '='}", "" if dot else meaning)
    # A section is told by its keys; what could also be given whole is not offered twice.
    yield from ((n, m) for n, m in offered.items() if f"{n.removesuffix('=')}." not in offered)


def _paths(incomplete: str) -> list[Offer]:
    """What lies in the folder that was typed so far; hidden files where a dot was."""
    above, _, begun = incomplete.rpartition("/")
    above += "/" if "/" in incomplete else ""
    try:
        entries = list(os.scandir(os.path.expanduser(above) or "."))
    except OSError:
        return []
    found = sorted(
        entry.name + ("/" if entry.is_dir() else "")
        for entry in entries
        if entry.name.startswith(begun) and (begun or not entry.name.startswith("."))
    )
    return [(above + name, "") for name in found]
