"""Weights from the network: fetched once into Detectron2's cache, or one line on what to do without them.

There is one attempt with a short timeout, so that a machine without a network answers in seconds.
"""

import contextlib
import hashlib
import http.client
import logging
import os
import re
import socket
import ssl
import threading
import urllib.error
import urllib.request
from urllib.parse import urlparse

from detectron2.utils.file_io import Detectron2Handler, PathManager
from huggingface_hub import constants as hub
from iopath.common.file_io import get_cache_dir

from .errors import UserError

TIMEOUT = 10.0  # seconds that a server may take to answer, and that a transfer may stall
# torchvision's convention: mobilenet_v2-b0353104.pth, the SHA-256 begins with b0353104. Eight decimal digits that look
# like a date (model-20240131.pth) are no hash.
_HASH_IN_NAME = re.compile(r"-(?!(?:19|20)\d{6}\.)([0-9a-f]{8,64})\.\w+$")
_NETWORK_ERRORS = (OSError, http.client.HTTPException)  # URLError and timeouts are OSErrors

logger = logging.getLogger(__name__)


def is_url(path: str) -> bool:
    return "://" in path


def local_weights(path: str, key: str, instead: str = "") -> str:
    """The local file of `path`, which may be a URL; the hash in its name is verified if it has one.

    In a run of several processes, call it inside of main_process_first, or all of them download.

    Args:
        path: a file, or a URL that Detectron2's PathManager reads (https://, detectron2://, ...).
        key: the config key that names it, for errors.
        instead: another way out for the error, such as "set it to '' to train from scratch".
    Raises:
        UserError: the URL cannot be fetched, or the file is damaged. A damaged file of the cache is deleted.
    """
    if not is_url(path):
        if os.path.isfile(path) and not _hash_fits(path):
            raise UserError(
                f"{path}: damaged or incomplete, its SHA-256 does not begin as its name says ({key}); fetch it again, "
                "or rename the file if its content is what you want."
            )
        return path
    return _fetch(path, key, instead)


def cached_path(url: str) -> str:
    """Where Detectron2's PathManager caches a URL: under FVCORE_CACHE, ~/.torch/iopath_cache by default."""
    url = _address(url)
    return os.path.join(get_cache_dir(), os.path.dirname(urlparse(url).path.lstrip("/")), url.split("/")[-1])


def check_answers(url: str, timeout: float | None = None) -> None:
    """Return if a server answers at all, were it with an error; nothing is read.

    The time limit covers name resolution and all addresses of the server, which those of sockets do not.

    Raises:
        OSError: there is no answer in time.
    """
    timeout = TIMEOUT if timeout is None else timeout
    outcome = [TimeoutError(f"no answer within {timeout:g} s")]

    def probe():
        try:
            with urllib.request.urlopen(url, timeout=timeout):
                outcome[0] = None
        except urllib.error.HTTPError:
            outcome[0] = None
        except urllib.error.URLError as error:  # whoever downloads may know certificates that urllib does not
            outcome[0] = None if isinstance(error.reason, ssl.SSLError) else error
        except _NETWORK_ERRORS as error:
            outcome[0] = OSError(str(error) or type(error).__name__)

    thread = threading.Thread(target=probe, daemon=True)
    thread.start()
    thread.join(timeout)
    if outcome[0] is not None:
        raise outcome[0]


def check_hub(repository: str) -> None:
    """Return if files of a Hugging Face repository are cached, or if the hub answers.

    The hub's client would retry for minutes.

    Raises:
        OSError: neither.
    """
    folder = os.path.join(hub.HF_HUB_CACHE, f"models--{repository.replace('/', '--')}", "snapshots")
    if os.path.isdir(folder) and any(files for _, _, files in os.walk(folder)):
        return
    if hub.HF_HUB_OFFLINE:
        raise OSError("HF_HUB_OFFLINE is set and it is not in the cache")
    check_answers(f"{hub.ENDPOINT}/api/models/{repository}")


def reason_of(error: BaseException) -> str:
    """Why a download failed, in one short line."""
    reason = getattr(error, "reason", error)
    return " ".join(str(getattr(reason, "strerror", None) or reason or type(error).__name__).split())[:150]


def download(url: str, path: str) -> None:
    """Write the content of a URL to a file, as a whole or not at all.

    Raises:
        OSError: it cannot be fetched or written. Nothing is left behind.
    """
    partial = f"{path}.tmp"
    try:
        os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
        with urllib.request.urlopen(url, timeout=TIMEOUT) as answer, open(partial, "wb") as file:
            expected, size = answer.headers.get("Content-Length"), 0
            while block := answer.read(1 << 20):
                file.write(block)
                size += len(block)
        if expected is not None and size != int(expected):
            raise OSError(f"only {size} of {expected} bytes arrived")
        os.replace(partial, path)
    except http.client.HTTPException as error:
        raise OSError(str(error) or type(error).__name__) from error
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.remove(partial)


def _fetch(url, key, instead):
    """Path in the cache, verified."""
    path = cached_path(url)
    if not os.path.isfile(path):
        try:
            address = _address(url)
            if address.startswith(("http://", "https://")):
                check_answers(address)
            with _timeout(), _quiet():
                path = PathManager.get_local_path(url)
        except (*_NETWORK_ERRORS, ValueError, AssertionError) as error:
            raise UserError(
                f"{url}: cannot be fetched ({reason_of(error)}; {key}); download it elsewhere and name the file in "
                f"{key}, or put it at {path}{instead and f', or {instead}'}."
            ) from error
        logger.info("%s was downloaded to %s", url, path)
    if not _hash_fits(path):
        with contextlib.suppress(OSError):
            os.remove(path)
        raise UserError(
            f"{url}: the copy {path} was damaged or incomplete and has been deleted ({key}); run again to fetch it, or "
            f"download it elsewhere and name the file in {key}."
        )
    return path


def _address(url):
    """The address behind Detectron2's short form."""
    if url.startswith(Detectron2Handler.PREFIX):
        return Detectron2Handler.S3_DETECTRON2_PREFIX + url[len(Detectron2Handler.PREFIX) :]
    return url


def _hash_fits(path):
    expected = _HASH_IN_NAME.search(os.path.basename(path))
    if expected is None:
        return True
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest().startswith(expected.group(1))


@contextlib.contextmanager
def _timeout():
    """iopath's downloads have no time limit of their own: a stalled one would never end."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(TIMEOUT)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


@contextlib.contextmanager
def _quiet():
    """iopath logs a failure before it raises it; the error that is raised says more."""
    log = logging.getLogger("iopath.common.download")
    before = log.disabled
    log.disabled = True
    try:
        yield
    finally:
        log.disabled = before
