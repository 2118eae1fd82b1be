"""Where the text comes from: a file, the network, or the documentation every Python carries.

    find_text(data) -> source          the one step that may touch the network, and the disk for writing
    read_text(source) -> bytes         the same for every process of a distributed run

Whatever is wrong with a file is a `DataError` of one line.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import lzma
import os
import zipfile
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from typing import BinaryIO
from urllib.request import urlopen

from command_line import UsageError
from tqdm import tqdm

URL = 'http://mattmahoney.net/dc/enwik8.zip'  # Matt Mahoney, Large Text Compression Benchmark
SHA256 = '2b49720ec4d78c3c9fabaee6e4179a5e997302b3a70029f30f2d582218c024a8'  # of the 100,000,000 bytes inside
TIMEOUT = 5.0  # seconds, for the connection and for every read
BUILTIN = 'builtin'

# what the standard library raises on damaged archives; RuntimeError: a password, or a compression it does not know
DAMAGED = (OSError, EOFError, zlib.error, lzma.LZMAError, zipfile.BadZipFile, RuntimeError)


class DataError(UsageError):
    """The text cannot be had, read or used; the message is one line that says why."""


def find_text(data: str, folder: Path = Path('data'), say: Callable[[str], object] = print) -> str:
    """Return the source that `data` names: the path of a file, or 'builtin'.

    'auto' is the first of `folder`/enwik8, .gz and .zip that is there; else enwik8.zip, downloaded to `folder`; else,
    when the network cannot be reached, 'builtin'. Anything else is returned as it is.

    Raises `DataError` when the download arrives damaged.
    """
    if data != 'auto':
        return data
    for name in ('enwik8', 'enwik8.gz', 'enwik8.zip'):
        if (folder / name).exists():
            return str(folder / name)
    try:
        response = connect()
    except (OSError, HTTPException, FutureTimeoutError) as error:
        why = str(error) or 'timed out'
        say(f'no {folder / "enwik8"}[.gz|.zip], no network ({why}): training on the documentation of Python')
        return BUILTIN
    with response:
        return str(download(response, folder / 'enwik8.zip'))


def connect() -> HTTPResponse:
    """Open `URL`, or raise within twice `TIMEOUT`: a socket's timeout alone does not bound the look-up of the name."""
    pool = ThreadPoolExecutor(1)
    try:
        return pool.submit(urlopen, URL, timeout=TIMEOUT).result(2 * TIMEOUT)
    finally:
        pool.shutdown(wait=False)


def download(response: HTTPResponse, path: Path) -> Path:
    """Save a zip of enwik8 as `path`, which comes to be only when its content has the right checksum."""
    total = int(response.headers['Content-Length'] or 0)
    content = io.BytesIO()  # 36 MB: an interrupted download has nothing to clean up
    try:
        with tqdm(desc=f'download {path.name}', total=total or None, unit='B', unit_scale=True) as bar:
            while chunk := response.read(1 << 16):
                bar.update(content.write(chunk))
        with open_zip(content) as file:
            right = hashlib.sha256(file.read()).hexdigest() == SHA256
    except (*DAMAGED, HTTPException) as error:
        raise DataError(f'the download of {URL} is truncated or corrupt: {error}') from error
    if not right:
        raise DataError(f'the download of {URL} does not have the checksum of enwik8')

    part = path.with_name(f'{path.name}.part')
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(content.getbuffer())
        os.replace(part, path)
    except OSError as error:
        raise DataError(f'cannot write {path}: {error}') from error
    finally:
        part.unlink(missing_ok=True)
    return path


def read_text(source: str, max_bytes: int | None = None) -> bytes:
    """Return the first `max_bytes` bytes (None: all) of a raw, .gz or .zip file, or of the 'builtin' text.

    An archive is read to its end whatever `max_bytes`: only there its checksum tells that it is whole.

    Raises `DataError` for a missing, truncated, corrupt or empty file.
    """
    if source == BUILTIN:
        return builtin_text()[:max_bytes]
    try:
        with open_text(Path(source)) as file:
            text = file.read(max_bytes)
            while file.read(1 << 20):
                pass
    except (FileNotFoundError, IsADirectoryError, PermissionError) as error:
        raise DataError(f'cannot read {source}: {error.strerror}') from error
    except DAMAGED as error:
        raise DataError(f'{source} is truncated or corrupt: {error}') from error
    if not text:
        raise DataError(f'{source} is empty')
    return text


def open_text(path: Path) -> BinaryIO:
    """Open a file for reading, decompressed as its suffix says."""
    openers = {'.gz': gzip.open, '.zip': open_zip}
    return openers.get(path.suffix.lower(), open)(path, 'rb')


def open_zip(path: Path | BinaryIO, mode: str = 'rb') -> BinaryIO:
    """Open the one file inside a zip."""
    archive = zipfile.ZipFile(path)
    names = [name for name in archive.namelist() if not name.endswith('/')]
    if len(names) != 1:
        raise zipfile.BadZipFile(f'it holds {len(names)} files, not one')
    return archive.open(names[0])


def builtin_text() -> bytes:
    """Return Python's own language reference, about 0.5 MB, each topic a <page> as the articles of enwik8 are."""
    from pydoc_data.topics import topics

    return ''.join(f'<page>\n{topic.strip()}\n</page>\n' for topic in topics.values()).encode()
