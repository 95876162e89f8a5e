"""Pickles of other tools, read without running anything that is written in them.

A pickle is a program: it names callables, and reading it calls them. Here every name is looked up
in a table of what the reader expects, and a name that is not in it ends the reading.
"""

from __future__ import annotations

import contextlib
import io
import pickle
import pickletools
from collections.abc import Callable, Iterator, Mapping
from typing import IO, Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from tessera.errors import DataError

# A released network has 30,000 operations, its training state 150,000, a batch of CIFAR-10 60,000.
_OPERATIONS = 500_000
LARGE = 65_536
"""Bytes of a string from which on it may be left where it is."""
_TUPLE = 100_000
"""Values in a tuple with all that is in its tuples: what hashing it goes through."""

Names = Mapping[tuple[str, str], Any]
"""What a pickle may refer to: (module, name) to what stands in its place."""


class Stand:
    """A function in a table of `Names`, which a pickle can call but not change."""

    __slots__ = ("_function",)
    _function: Callable[..., Any]

    def __init__(self, function: Callable[..., Any]) -> None:
        object.__setattr__(self, "_function", function)

    def __call__(self, *args: Any) -> Any:
        return self._function(*args)

    # Pickles can set attributes of whatever they have got hold of.
    def __setattr__(self, name: str, value: Any) -> NoReturn:
        raise TypeError("not a value with a state")


def load_pickle(
    file: IO[bytes],
    names: Names,
    *,
    encoding: str = "ASCII",
    persistent: Callable[[Any], Any] | None = None,
    large: Callable[[int, int], Any] | None = None,
) -> Any:
    """What a pickle holds, built from plain values and `names` alone.

    Afterwards the file stands behind the pickle.

    Args:
        names: everything the pickle may refer to. Their values must be safe to call with any
            arguments, and safe to set attributes of.
        encoding: of the strings that Python 2 wrote; "bytes" leaves them undecoded.
        persistent: gives the values that the pickle refers to by a persistent id.
        large: gives what stands for strings of `LARGE` bytes or more, by offset in the file and
            length; they are not read. Not together with `persistent`.

    Raises:
        DataError: the pickle is damaged, would take time or memory out of all proportion to its
            size, or refers to anything else, which the message names.
    """
    with _damage():
        start = file.tell()
        if large is None:
            _check_program(pickletools.genops(file))
            file.seek(start)
            reader = _Reader(file, encoding=encoding)
            reader.names, reader.persistent = names, persistent
            return reader.load()
        spared = _SparedStrings(file)
        _check_program(spared.operations())
        end = file.tell()
        reader = _Reader(io.BytesIO(spared.program(end)), encoding=encoding)
        reader.names, reader.persistent = names, lambda index: large(*spared.strings[index])
        value = reader.load()
        file.seek(end)
        return value


@contextlib.contextmanager
def _damage() -> Iterator[None]:
    try:
        yield
    except DataError:
        raise
    except Exception as error:  # damaged pickles raise nearly anything
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise DataError(f"not a whole pickle of the expected kind ({reason})") from error


Operation = tuple[pickletools.OpcodeInfo, Any, int | None]


class _Unread(bytes):
    """Stands for a string that was skipped, of which it has the length."""

    size = 0

    def __len__(self) -> int:
        return self.size


class _SparedStrings:
    """A pickle as a program without its large strings, which are put in by number.

    Args:
        file: stands at the beginning of the pickle, and can seek.

    Attributes:
        strings: offset in the file and length of each large string.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._operation, self._start = file, b"", file.tell()
        self.strings: list[tuple[int, int]] = []
        self._changed: list[tuple[int, int, bytes]] = []  # from, to, and what to put there

    def operations(self) -> Iterator[Operation]:
        """As `pickletools.genops`; arguments of large strings have a length and nothing else."""
        for operation, argument, position in pickletools.genops(self):  # type: ignore[arg-type]
            assert position is not None
            if operation.name in ("PERSID", "BINPERSID"):
                raise DataError("it refers to values outside of the pickle")
            if operation.name == "FRAME":  # without strings it would have another length
                self._changed.append((position, self.tell(), b""))
            elif isinstance(argument, _Unread):
                number = pickle.BININT + (len(self.strings) - 1).to_bytes(4, "little")
                self._changed.append((position, self.tell(), number + pickle.BINPERSID))
            yield operation, argument, position

    def program(self, end: int) -> bytes:
        """What ends at `end`, when all operations have been gone through."""
        parts, at = [], self._start
        for first, after, text in [*self._changed, (end, end, b"")]:
            self._file.seek(at)
            parts += [self._file.read(first - at), text]
            at = after
        return b"".join(parts)

    # What pickletools needs of a file.

    def tell(self) -> int:
        return self._file.tell()

    def readline(self) -> bytes:
        return self._file.readline()

    def read(self, size: int) -> bytes:
        if size == 1:
            self._operation = self._file.read(1)
            return self._operation
        if size < LARGE or self._operation not in (pickle.BINBYTES, pickle.BINBYTES8):
            return self._file.read(size)
        self.strings.append((self._file.tell(), size))
        self._file.seek(size, 1)
        unread = _Unread()
        unread.size = size
        return unread


def _check_program(operations: Iterator[Operation]) -> None:
    """Go through a pickle without running it, and refuse what the reader itself would suffer from.

    That are numbers of remembered values that make it reserve gigabytes, and tuples of tuples that
    are small to write and endless to hash.
    """
    stack: list[Any] = []  # of each value what hashing it goes through; at marks `markobject`
    memo: dict[int, int] = {}
    for count, (operation, argument, _) in enumerate(operations):
        if count > _OPERATIONS:
            raise DataError(f"a pickle of more than {_OPERATIONS:,} operations")
        name, takes = operation.name, len(operation.stack_before)
        if "PUT" in name or name == "MEMOIZE":
            number = len(memo) if name == "MEMOIZE" else int(argument or 0)
            if number > _OPERATIONS:
                raise DataError("it remembers values under numbers that no pickle has")
            memo[number] = stack[-1]
            continue
        if "GET" in name:
            stack.append(memo[int(argument or 0)])
            continue
        if pickletools.markobject in operation.stack_before:
            taken = []
            while (value := stack.pop()) is not pickletools.markobject:
                taken.append(value)
            takes = operation.stack_before.index(pickletools.markobject)
        else:
            taken = []
        taken += [stack.pop() for _ in range(takes)]
        sizes = [value for value in taken if isinstance(value, int)]
        size = 1 + sum(sizes) if "TUPLE" in name else 1
        if size > _TUPLE:
            raise DataError("a tuple of tuples that is out of all proportion")
        if name == "DUP":
            stack += [*sizes, *sizes]
        elif name != "POP":
            made = operation.stack_after
            stack += [x if x is pickletools.markobject else size for x in made]


class _Reader(pickle.Unpickler):
    names: Names
    persistent: Callable[[Any], Any] | None

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self.names[module, name]
        except KeyError:
            raise DataError(
                f"it refers to {module}.{name}, which may run code; it is refused"
            ) from None

    def persistent_load(self, pid: Any) -> Any:
        if self.persistent is None:
            raise DataError("it refers to values outside of the pickle")
        return self.persistent(pid)


def _empty_array(kind: type, shape: tuple[int, ...], code: bytes) -> NDArray[Any]:
    return np.ndarray(0, np.int8)  # filled by the state that follows in the pickle


def _latin1(text: str, encoding: str = "latin1") -> bytes:
    return text.encode("latin1")


_FROM_BUFFER: Any = np.zeros(1).__reduce_ex__(5)[0]
_SCALAR: Any = np.float64(0).__reduce__()[0]
_MODULES = ("numpy.core", "numpy._core")

# How Python 3 writes bytes for Python 2.
BYTES: Names = {("_codecs", "encode"): Stand(_latin1)}

# What the pickles of NumPy's arrays and numbers refer to, by the old and the new names.
NUMPY: Names = {
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    **{(f"{m}.multiarray", "_reconstruct"): Stand(_empty_array) for m in _MODULES},
    **{(f"{m}.multiarray", "scalar"): Stand(_SCALAR) for m in _MODULES},
    **{(f"{m}.numeric", "_frombuffer"): Stand(_FROM_BUFFER) for m in _MODULES},
    **BYTES,
}
