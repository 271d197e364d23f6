"""The options of `openelm serve`; imports nothing that reads models, so help is instant."""

from __future__ import annotations

import argparse

SERVE_EXAMPLE = (
    "openelm serve runs/demo/model\n\n"
    "  then, in a browser:   http://127.0.0.1:8000\n"
    "  from Python:          OpenAI(base_url='http://127.0.0.1:8000/v1', api_key='none')\n"
    "  from a shell:         curl http://127.0.0.1:8000/v1/completions -H 'Content-Type: application/json' \\\n"
    '                          -d \'{"model": "model", "prompt": "Once upon", "max_tokens": 20}\'\n\n'
    "for other machines too (a reverse proxy adds TLS):\n"
    "  (umask 077; openssl rand -hex 24 > key)\n"
    "  openelm serve runs/demo/model --host 0.0.0.0 --api-key-file key\n\n"
    "Ctrl-C or SIGTERM ends it: answers that are being made get 8 seconds to finish."
)


def add_serve_options(parser: argparse.ArgumentParser) -> None:
    """Describe the options."""
    parser.add_argument("model", help="model folder with a tokenizer")
    parser.add_argument("--name", help="what requests call the model (default: the folder's name)")
    parser.add_argument(
        "--slots", type=int, default=4, metavar="N", help="sequences made side by side (default: %(default)s)"
    )
    parser.add_argument(
        "--context", type=int, metavar="N", help="tokens of a prompt and its answer (default: the model's context)"
    )
    parser.add_argument(
        "--queue", type=int, default=64, metavar="N", help="requests that may wait for a slot (default: %(default)s)"
    )
    net = parser.add_argument_group("network")
    net.add_argument(
        "--host", default="127.0.0.1", help="address to listen on; others need a key (default: %(default)s)"
    )
    net.add_argument("--port", type=int, default=8000, help="0 takes a free one (default: %(default)s)")
    net.add_argument(
        "--api-key-file",
        metavar="FILE",
        help="a file of mode 0600, one key a line; or set OPENELM_API_KEY. Keys are never taken from the command line",
    )
    net.add_argument(
        "--allow-host",
        action="append",
        default=[],
        metavar="NAME",
        help="a name the server is reached by, such as that of a reverse proxy; may be repeated",
    )
    budgets = parser.add_argument_group("budgets of each key; without keys, of all callers together (default: none)")
    budgets.add_argument(
        "--key-requests-per-minute", type=int, metavar="N", help="completions and chats; up to N of them at once"
    )
    budgets.add_argument(
        "--key-tokens-per-minute",
        type=int,
        metavar="N",
        help="of prompts and answers; what is being made is finished, and what is overdrawn has to come back first",
    )
    budgets.add_argument("--key-concurrent", type=int, metavar="N", help="choices that wait or are being made")
