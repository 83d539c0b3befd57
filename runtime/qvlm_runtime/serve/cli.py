"""qvlm-serve: a model folder behind an OpenAI-compatible HTTP interface.

Exit 0 stopped by a signal, 1 failed (one line on stderr), 2 usage.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

from qvlm_runtime.backend import BACKENDS, EXACT, FAST
from qvlm_runtime.errors import RuntimeFault, ServeError, SessionError
from qvlm_runtime.features import DEFAULT_BYTES, FeatureCache
from qvlm_runtime.loading import load
from qvlm_runtime.serve.access import LOOPBACK, Access
from qvlm_runtime.serve.app import App
from qvlm_runtime.serve.limits import Limits

_TOKEN = "QVLM_SERVE_TOKEN"
_MIB = 1 << 20
# Sockets beside the answers that run and wait: pages, health, metrics, idle keep-alive.
_SPARE_CONNECTIONS = 64
_SHUTDOWN_SECONDS = 5


def _parser() -> argparse.ArgumentParser:
    limits = Limits()
    parser = argparse.ArgumentParser(
        prog="qvlm-serve",
        description="Serve a folder written by qvlm-export: OpenAI's chat completions, and a page.",
        epilog=f"A bearer token is read from --token-file or the environment's {_TOKEN}.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("folder", metavar="OUT", help="folder written by qvlm-export")
    add("--host", default="127.0.0.1", help="address to listen on (default: this machine only)")
    add("--port", type=int, default=8000, help="0 takes a free one (default: %(default)s)")
    add("--allow-host", action="append", default=[], metavar="NAME",
        help="a further name clients may call this server by; may be repeated")  # fmt: skip
    add("--token-file", type=Path, metavar="FILE", help="first line: the bearer token to ask for")
    add("--name", help="the model's name for clients (default: the folder's)")
    add("--image-root", type=Path, metavar="DIR", help="allow image files below this folder")
    add("--target", help="default: one with engines for this GPU, ort, or the only one")
    add("--backend", choices=BACKENDS, help="default: engines built for this GPU, else ort")
    add("--threads", type=int, metavar="N", help="default: the engine's choice")
    add("--exact", action="store_true", help="float32 activations in INT4 products (slower)")
    add("--no-verify", action="store_true", help="do not compare the files' sha256")
    add("--cache-limit", type=int, metavar="MIB", help="memory for all caches; kept ones make room")
    add("--kept-caches", type=int, metavar="N",
        help="caches of finished answers, so that a conversation's next turn runs only what is new; "
        "clients can tell by the time whether a prompt's beginning was asked before; 0 keeps none "
        "(default: as many as answers run at once)")  # fmt: skip
    add("--image-cache", type=int, default=DEFAULT_BYTES // _MIB, metavar="MIB",
        help="memory for features of images seen before (default: %(default)s)")  # fmt: skip
    for option, value, text in (
        ("concurrent", limits.concurrent, "answers that run at once"),
        ("queue", limits.queue, "requests that may wait for their turn"),
        ("queue-seconds", limits.queue_seconds, "how long they may"),
        ("request-seconds", limits.request_seconds, "how long an answer may take"),
        ("body-bytes", limits.body_bytes, "of a request"),
        ("body-seconds", limits.body_seconds, "how long a request may take to arrive"),
        ("images", limits.images, "of a request"),
        ("image-pixels", limits.image_pixels, "of an image, before it is decoded"),
        ("new-tokens", limits.new_tokens, "of an answer"),
        ("prefill-chunk", limits.prefill_chunk, "tokens of a prompt run at a time"),
    ):
        add(f"--max-{option}" if option != "prefill-chunk" else f"--{option}",
            type=type(value), default=value, metavar="N",
            help=f"{text} (default: %(default)s)", dest=option.replace("-", "_"))  # fmt: skip
    return parser


def _token(path: Path | None) -> str | None:
    if path is None:
        return os.environ.get(_TOKEN) or None
    try:
        token = path.read_text(encoding="utf-8").splitlines()[0].strip()
    except (OSError, UnicodeDecodeError, IndexError) as error:
        raise ServeError(f"{path}: no token in the first line ({error}).") from error
    if not token:
        raise ServeError(f"{path}: the first line is empty, expected the token.")
    return token


def _access(args: argparse.Namespace, token: str | None) -> Access:
    """A server for this machine knows its names; one for others has those it was told, or any."""
    local = args.host in LOOPBACK
    if not local and token is None:
        raise ServeError(
            f"--host {args.host}: other machines could use the model without a token. "
            f"Give --token-file or {_TOKEN}."
        )
    names = {name.lower() for name in args.allow_host}
    hosts = frozenset(LOOPBACK | names | {args.host.lower()}) if local or names else None
    return Access(token, hosts)


def _limits(args: argparse.Namespace) -> Limits:
    limits = Limits(**{name: getattr(args, name) for name in Limits.__dataclass_fields__})
    for name, value in vars(limits).items():
        if value is not None and value < 0:
            raise ServeError(f"{name}: got {value}, expected at least 0.")
        if value == 0 and name not in ("queue", "images", "kept_caches"):
            raise ServeError(f"{name}: got 0, expected more than 0.")
    return limits


def _serve(args: argparse.Namespace) -> None:
    try:
        import uvicorn
    except ImportError as error:
        raise SessionError(
            f"uvicorn is not installed ({error}). pip install 'qvlm[serve]'"
        ) from error
    limits, access = _limits(args), _access(args, _token(args.token_file))
    if args.image_root is not None and not args.image_root.is_dir():
        raise ServeError(f"{args.image_root}: no such folder. Give --image-root a folder.")
    with load(
        args.folder,
        args.target,
        backend=args.backend,
        threads=args.threads,
        accuracy_level=EXACT if args.exact else FAST,
        verify=not args.no_verify,
        cache_limit=None if args.cache_limit is None else args.cache_limit * _MIB,
        feature_cache=FeatureCache(args.image_cache * _MIB),
    ) as model:
        name = args.name or Path(args.folder).resolve().name
        app = App(model, name, limits, access, args.image_root)
        config = uvicorn.Config(
            app,
            ws="none",
            log_level="warning",
            server_header=False,
            limit_concurrency=limits.concurrent + limits.queue + _SPARE_CONNECTIONS,
            timeout_graceful_shutdown=_SHUTDOWN_SECONDS,
        )
        try:
            # uvicorn stops in order and raises the signal again: this makes it an exit, not a death.
            signal.signal(signal.SIGTERM, signal.default_int_handler)
            with _listen(args.host, args.port) as listening:
                host, port = listening.getsockname()[:2]
                shown = f"[{host}]" if ":" in host else host
                print(f"qvlm-serve: {name} at http://{shown}:{port}", flush=True)
                print(f"qvlm-serve: {_memory(app)}", flush=True)
                uvicorn.Server(config).run(sockets=[listening])
        finally:
            app.close()


def _memory(app: App) -> str:
    """What caches may take, in words."""
    kept, rows = app.limits.kept, app.model.decoder.max_rows
    return (
        f"at most {max(kept, app.limits.concurrent)} caches of at most {rows} rows, together at most "
        f"{app.most_cache_bytes / 1e6:.1f} MB; {kept or 'none'} kept between requests (--kept-caches)"
    )


def _listen(host: str, port: int) -> socket.socket:
    if not 0 <= port <= 65535:
        raise ServeError(f"--port {port}: expected 0 to 65535.")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=128)
    except OSError as error:
        raise ServeError(f"--host {host} --port {port}: {error}. Choose another.") from error


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of qvlm-serve; returns the exit code."""
    args = _parser().parse_args(argv)
    try:
        _serve(args)
    except RuntimeFault as fault:
        print(f"qvlm-serve: {fault}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 0
    return 0


if __name__ == "__main__":
    sys.exit(main())
