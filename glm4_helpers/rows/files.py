"""Rows from files, folders and hubs, read by what a file holds and not by its name; each keeps its place for messages.

What the columns of a row mean is decided in shapes. Nothing here knows about messages, models or profiles.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import os
import re
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..checks.values import kind
from ..support.errors import CourseError, DataError, MachineError, SettingError, first_line
from ..support.paths import data_dir, home

ENDINGS = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".arrow", ".xlsx", ".zip")
"""Files of a folder that are read; ``.gz``, ``.bz2`` or ``.xz`` may follow. A file that is named itself may be called
anything."""

_NOT_ROWS = ("dataset_info", "dataset_dict.json", "state.json")
"""How the names of files begin that tell about rows and hold none."""

_HUB_ID = re.compile(r"(\w[\w.-]*/\w[\w.-]*)(?::([\w.-]*))?(?::([\w.-]*))?")


class LocatedRow(NamedTuple):
    """A row (or what is wrong with it) and its place, such as "data/train.jsonl, row 3 (line 4)"."""

    where: str
    row: Mapping[str, Any] | DataError
    encoding: str = ""


def located_rows(source: str | Path | Sequence[str | Path]) -> list[LocatedRow]:
    """All rows of a file, a folder with all below it, a hub id, or several of these; never an empty list.

    A hub id is OWNER/NAME, OWNER/NAME:CONFIGURATION or OWNER/NAME:CONFIGURATION:SPLIT (the middle may be empty).
    Raises DataError for what can't be read at all; a row that is not usable is returned with its error.
    """
    several = isinstance(source, (list, tuple))
    rows = [row for each in (source if several else [source]) for row in _rows(each)]
    if not rows:
        shown = ", ".join(map(str, source)) if several else source
        raise DataError(f"{shown} holds no rows.", "Give a file with at least one row, such as JSON or CSV.")
    return rows


def local_copy(hub_id: str) -> Path:
    """Where a downloaded data set lands: data/NAME.json, NAME being the part of the hub id after the slash."""
    return data_dir() / _copy_name(hub_id)


def skipped_files(source: str | Path | Sequence[str | Path]) -> list[str]:
    """Files in the folders of ``source`` that are not read as rows, such as README.md; hidden ones are not listed."""
    folders = [_find(each) for each in (source if isinstance(source, (list, tuple)) else [source])]
    below = [(folder, file) for folder in folders if folder and folder.is_dir() for file in _visible(folder)]
    return [str(file.relative_to(folder)) for folder, file in below if not _holds_rows(file) and not _is_saved(folder)]


def _copy_name(hub_id: str) -> str:
    return f"{hub_id.rpartition('/')[2].replace(':', '-')}.json"


# Where rows are


def _rows(source: str | Path) -> list[LocatedRow]:
    path = _find(source)
    if path is None:
        return _hub_rows(str(source))
    if not path.is_dir():
        return list(_file_rows(_read(path, str(source)), str(source)))
    if _is_saved(path):
        import datasets

        return _table_rows(_one_split(datasets.load_from_disk(str(path)), f"{source}", "/"), str(source))
    files = [file for file in _visible(path) if _holds_rows(file)]
    shown = [f"{source}/{file.relative_to(path).as_posix()}" for file in files]
    return [row for file, name in zip(files, shown) for row in _file_rows(_read(file, name), name)]


def _is_saved(folder: Path) -> bool:
    """Whether the folder is what ``save_to_disk`` of datasets writes."""
    return any((folder / name).is_file() for name in ("dataset_dict.json", "state.json"))


def _visible(folder: Path) -> list[Path]:
    """The files below a folder in the order of names, without hidden ones and those that macOS puts beside files."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return [file for file in files if not any(part.startswith(".") for part in file.relative_to(folder).parts)]


def _holds_rows(file: Path) -> bool:
    name = re.sub(r"\.(gz|bz2|xz)$", "", file.name.lower())
    return name.endswith(ENDINGS) and not name.startswith(_NOT_ROWS)


def _find(source: str | Path) -> Path | None:
    """The file or folder that ``source`` names; None if it is a hub id without a local copy."""
    path = Path(source).expanduser()
    candidates = [path] if path.is_absolute() else [path, *_in_home(path)]
    is_hub_id = _looks_like_hub_id(source, candidates)
    if is_hub_id:
        candidates += _in_home(Path("data") / _copy_name(str(source)))
    for candidate in candidates:
        if candidate.exists():
            return candidate
    if is_hub_id:
        return None
    raise DataError(
        f"{source} was not found.",
        "Check the path. The course's own rows come with the clone; `python -m nano data` writes them.",
    )


def _in_home(path: Path) -> list[Path]:
    try:
        return [home() / path]
    except CourseError:  # outside a clone, paths count from the working folder alone
        return []


def _looks_like_hub_id(source: str | Path, candidates: Iterable[Path]) -> bool:
    """OWNER/NAME, unless OWNER is a folder at hand or NAME is that of a file."""
    if not isinstance(source, str) or not _HUB_ID.fullmatch(source):
        return False
    return not _holds_rows(Path(source)) and not any(path.parent.is_dir() for path in candidates)


def _read(path: Path, shown: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{shown} can't be read: {error.strerror}.", "Check the path and its permissions.") from error


# What a file holds


def _file_rows(data: bytes, shown: str) -> Iterable[LocatedRow]:
    """Rows by the first bytes of a file, else as text."""
    for start, what, fix in _OTHER_FILES:
        if data.startswith(start):
            raise DataError(f"{shown} is {what}, which is not read.", fix)
    for start, what, read in _BINARY_FILES:
        if data.startswith(start):
            try:
                return read(data, shown)
            except CourseError:
                raise
            except Exception as error:  # each library has errors of its own
                fix = "Download or write the file once more."
                raise DataError(f"{shown} can't be read as {what}: {first_line(error)}", fix) from error
    text, encoding = _decoded(data, shown)
    return [row._replace(encoding=encoding) for row in _text_rows(text, shown)]


def _zip_rows(data: bytes, shown: str) -> list[LocatedRow]:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        if "[Content_Types].xml" in archive.namelist():
            return _excel_rows(data, shown)
        names = [name for name in sorted(archive.namelist()) if _holds_rows(Path(name))]
        names = [name for name in names if not any(part.startswith((".", "__MACOSX")) for part in Path(name).parts)]
        return [row for name in names for row in _file_rows(archive.read(name), f"{shown}/{name}")]


def _excel_rows(data: bytes, shown: str) -> list[LocatedRow]:
    import pandas

    try:
        sheets = pandas.read_excel(
            io.BytesIO(data), sheet_name=None, dtype=object, keep_default_na=False, na_values=[""], engine="openpyxl"
        )
    except ImportError as error:
        fix = "Install openpyxl with python -m pip install openpyxl, or save the sheet as CSV in UTF-8."
        raise MachineError(f"{shown} is an Excel file, and pandas needs openpyxl to read it.", fix) from error
    return [
        LocatedRow(f"{shown}, sheet {name}, row {number}", row)
        for name, sheet in sheets.items()
        for number, row in enumerate(sheet.to_dict("records"), 2)  # as Excel counts: the header is row 1
    ]


def _parquet_rows(data: bytes, shown: str) -> list[LocatedRow]:
    import pyarrow.parquet

    return _table_rows(pyarrow.parquet.read_table(io.BytesIO(data)), shown)


def _arrow_rows(data: bytes, shown: str) -> list[LocatedRow]:
    import pyarrow

    opened = pyarrow.ipc.open_file(data) if data.startswith(b"ARROW1") else pyarrow.ipc.open_stream(data)
    return _table_rows(opened.read_all(), shown)


def _table_rows(table: Any, shown: str) -> list[LocatedRow]:
    """Rows of an Arrow table or a Dataset."""
    rows = table.to_pylist() if hasattr(table, "to_pylist") else table.to_list()
    return [LocatedRow(f"{shown}, row {number}", without_nulls(row)) for number, row in enumerate(rows, 1)]


def without_nulls(value: Any) -> Any:
    """The value without keys that hold null, as it was before a table gave it the columns of other rows."""
    if isinstance(value, Mapping):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, (list, tuple)) else value


_BINARY_FILES = (
    (b"\x1f\x8b", "gzip", lambda data, shown: _file_rows(gzip.decompress(data), shown)),
    (b"BZh", "bzip2", lambda data, shown: _file_rows(bz2.decompress(data), shown)),
    (b"\xfd7zXZ", "xz", lambda data, shown: _file_rows(lzma.decompress(data), shown)),
    (b"PK\x03\x04", "a zip or Excel file", _zip_rows),
    (b"PAR1", "Parquet", _parquet_rows),
    (b"ARROW1", "Arrow", _arrow_rows),
    (b"\xff\xff\xff\xff", "Arrow", _arrow_rows),
)
_SAVE_AS = "Save it as JSON, JSON Lines, CSV, Excel or Parquet."
_UNPACK = "Unpack it, and give the file or the folder."
_OTHER_FILES = (
    (b"version https://git-lfs", "a Git LFS pointer without its data", "Run git lfs pull, or download the file."),
    (b"PK\x05\x06", "an empty zip file", "Pack the files with rows into it once more."),
    (b"\x00\x05\x16\x07", "a file that macOS writes beside the real one", "Give the one without ._ in its name."),
    (b"\xd0\xcf\x11\xe0", "an old Excel file (.xls)", "Save it as .xlsx, or as CSV in UTF-8."),
    (b"%PDF", "a PDF", "Write its text into rows, such as JSON Lines with instruction and output."),
    (b"(\xb5/\xfd", "compressed with zstd", _UNPACK),
    (b"7z\xbc\xaf", "a 7z archive", _UNPACK),
    (b"Rar!", "a RAR archive", _UNPACK),
)


def _decoded(data: bytes, shown: str) -> tuple[str, str]:
    """Text and its encoding: UTF-8, or the UTF-16 or UTF-32 that the first bytes tell. No other is guessed."""
    if data[257:262] == b"ustar":
        raise DataError(f"{shown} is a tar archive, which is not read.", _UNPACK)
    encoding = json.detect_encoding(data)
    try:
        return data.decode(encoding), encoding
    except UnicodeDecodeError as error:
        if b"\0" in data:
            raise DataError(f"{shown} is a binary file of a kind that is not read.", _SAVE_AS) from error
        problem = f"{shown} is not {encoding.upper().removesuffix('-SIG')} text (byte {error.start})"
    try:
        line = next(line for line in data.decode("gb18030").splitlines() if not line.isascii()).strip()
    except (UnicodeDecodeError, StopIteration):
        raise DataError(f"{problem}.", "Save the file as UTF-8.") from None
    # Bytes of other encodings can pass as GBK, too, so the user has to look.
    new = Path(shown).with_name(f"utf8-{Path(shown).name}").as_posix()
    convert = f"from pathlib import Path; Path(r'{new}').write_bytes(Path(r'{shown}').read_text('gb18030').encode())"
    fix = f'If that is right, convert it with python -c "{convert}" and use {new}.'
    raise DataError(f"{problem}. Read as GBK, it has {line[:30]!r}.", fix)


def _text_rows(text: str, shown: str) -> Iterable[LocatedRow]:
    text = text.removeprefix("\ufeff")
    lines = [line for line in text.split("\n") if line.strip()]
    if not lines:
        raise DataError(f"{shown} is empty.", "Give a file with at least one row.")
    first = lines[0].strip()
    if first.startswith("<"):
        fix = "Download the file itself: its address on a hub has /resolve/, where the page has /blob/."
        raise DataError(f"{shown} is a web page or XML, not rows.", fix)
    ends = [line.strip().lstrip("\ufeff").removesuffix(",") for line in (first, lines[-1])]
    if len(lines) > 1 and first.startswith("{") and any(map(_is_object, ends)):
        return _jsonl_rows(text, shown)
    if first.startswith(("[", "{")):
        return _json_rows(text, shown)
    if any(mark in first for mark in _MARKS):
        return _csv_rows(text, shown)
    raise DataError(
        f"{shown} is not JSON, nor a table with a line of column names: it begins with {first[:30]!r}.",
        "Put a comma (,) between cells instead of ，." if "，" in first else _SAVE_AS,
    )


def _is_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


def _json(text: str) -> Any:
    return json.loads(text, parse_constant=lambda name: None)  # NaN, which pandas writes where there is nothing


def _json_rows(text: str, shown: str) -> list[LocatedRow]:
    try:
        rows = _json(text)
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}"
        problem = f"{shown} is not JSON: {error.msg.removesuffix(' at')} in {place}."
        fix = "Correct the file there: JSON is one list of all rows, JSON Lines have one object a line."
        raise DataError(problem, fix) from error
    if not isinstance(rows, list):
        if rows and all(isinstance(value, dict) for value in rows.values()):
            fix = "Write it with to_json(path, orient='records', force_ascii=False)."
            raise DataError(f"{shown} holds an object of columns, as pandas writes it, instead of a list of rows.", fix)
        lists = [key for key, value in rows.items() if isinstance(value, list) and value and isinstance(value[0], dict)]
        if not lists or lists[0] in ("messages", "conversations", "conversation"):
            return [LocatedRow(f"{shown}, row 1", rows)]
        problem = f"{shown} holds an object with a list in {lists[0]!r} instead of a list of rows."
        raise DataError(problem, "Save that list alone.")
    return [_located(row, f"{shown}, row {number}") for number, row in enumerate(rows, 1)]


def _jsonl_rows(text: str, shown: str) -> Iterator[LocatedRow]:
    number = 0
    # Only "\n" ends a line here: str.splitlines would also cut at the U+2028 that JSON strings may hold.
    for line_number, line in enumerate(text.split("\n"), 1):
        line = line.lstrip("\ufeff")  # where files with a byte order mark were joined
        if not line.strip():
            continue
        number += 1
        where = f"{shown}, row {number} (line {line_number})"
        try:
            yield _located(_json(line), where)
        except json.JSONDecodeError as error:
            problem = f"it is not JSON: {error.msg.removesuffix(' at')} in column {error.colno}."
            comma = " without the comma after it" if line.rstrip().endswith(",") else ""
            yield LocatedRow(where, DataError(problem, f"Write one JSON object a line{comma}."))


def _located(row: Any, where: str) -> LocatedRow:
    if isinstance(row, dict):
        return LocatedRow(where, row)
    fix = 'Write each row as {"instruction": "...", ...}.'
    return LocatedRow(where, DataError(f"it is {kind(row)} instead of an object.", fix))


_MARKS = (",", "\t", ";")


def _csv_rows(text: str, shown: str) -> Iterator[LocatedRow]:
    """Rows of a table whose first line names the columns; cells that are empty are absent."""
    first = text.lstrip().split("\n", 1)[0]
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=max(_MARKS, key=first.count), strict=True)
    names: list[str] = []
    start, limit = 1, csv.field_size_limit(max(len(text), csv.field_size_limit()))
    try:
        for cells in reader:
            cells[:1] = [cell.lstrip("\ufeff") for cell in cells[:1]]  # where files with a byte order mark were joined
            line, start = start, reader.line_num + 1
            where = f"{shown}, line {line}"
            if not any(cells):
                continue
            if not names:
                names = cells
                named = [name for name in names if name]  # spreadsheets leave commas where nothing is
                if len(set(named)) < len(named):
                    raise DataError(f"{shown} has two columns of the same name.", "Rename one in the first line.")
            elif cells == names:
                yield LocatedRow(where, DataError("it repeats the column names.", "Remove the line."))
            elif len(cells) != len(names):
                problem = f"it has {len(cells)} cells, and there are {len(names)} column names."
                yield LocatedRow(where, DataError(problem, 'Put cells with commas or line breaks into "quotes".'))
            else:
                yield LocatedRow(where, {name: cell for name, cell in zip(names, cells) if cell not in ("", "NaN")})
    except csv.Error as error:
        fix = 'A cell that begins with " has to end with it, and a " inside it is written twice.'
        raise DataError(f"{shown}, line {start} is not CSV: {error}.", fix) from error
    finally:
        csv.field_size_limit(limit)


# Hubs


def _hub_rows(source: str) -> list[LocatedRow]:
    hub = os.environ.get("GLM4_HUB") or "huggingface"
    if hub not in ("huggingface", "modelscope"):
        raise SettingError(f"GLM4_HUB is {hub!r}.", "Set it to huggingface or modelscope, or unset it.")
    title = {"huggingface": "Hugging Face", "modelscope": "ModelScope"}[hub]
    load = {"huggingface": _from_hugging_face, "modelscope": _from_modelscope}[hub]
    try:
        return load(*_HUB_ID.fullmatch(source).groups())
    except CourseError:
        raise
    except Exception as error:  # the hubs raise dozens of kinds: network, absent, gated, unreadable
        reason = " ".join(str(error).split())[:300] or first_line(error)
        fix = (
            "Check name and network, set GLM4_HUB to the other hub (huggingface, modelscope), "
            f"or save it as data/{_copy_name(source)} in the course folder."
        )
        if "Config name is missing" in reason:
            fix = "Name a configuration, as in owner/name:configuration."
        raise DataError(f"{source} is no file here and could not be read from {title}: {reason}", fix) from error


def _from_hugging_face(hub_id: str, configuration: str | None, split: str | None) -> list[LocatedRow]:
    import datasets

    found = datasets.load_dataset(hub_id, configuration or None, split=split or None)
    return _table_rows(_one_split(found, f"{hub_id}:{configuration or ''}", ":"), hub_id)


def _one_split(found: Any, shown: str, separator: str) -> Any:
    """The data set itself, its split called train, or its only one."""
    if not isinstance(found, dict):
        return found
    if "train" not in found and len(found) > 1:
        raise DataError(
            f"{shown.rstrip(':')} has the splits {', '.join(found)}, and none is called train.",
            f"Name one, as in {shown}{separator}{next(iter(found))}.",
        )
    return found["train"] if "train" in found else next(iter(found.values()))


def _from_modelscope(hub_id: str, configuration: str | None, split: str | None) -> list[LocatedRow]:
    """The rows of the repository's JSON files. ModelScope's own reader needs an older datasets package than ours."""
    if configuration or split:
        fix = f"Give {hub_id}, or download the file that you mean and give its path."
        raise SettingError("Sets from ModelScope are read whole, without configuration and split.", fix)
    try:
        from modelscope.hub.snapshot_download import dataset_snapshot_download
    except ImportError as error:
        raise MachineError(
            f"GLM4_HUB is modelscope, but the package modelscope can't be imported: {first_line(error)}.",
            'Install it with python -m pip install -e ".[modelscope]", or unset GLM4_HUB.',
        ) from error
    folder = Path(dataset_snapshot_download(hub_id, allow_patterns=["*.json", "*.jsonl"]))
    files = [file for file in _visible(folder) if _holds_rows(file)]
    return [row for file in files for row in _file_rows(_read(file, str(file)), f"{hub_id}/{file.name}")]


def canonical(value: Any) -> bytes:
    """JSON that does not depend on key order nor on the nulls that a table puts where a row has no value."""
    return json.dumps(without_nulls(value), ensure_ascii=False, sort_keys=True, separators=(",", ":")).encode()
