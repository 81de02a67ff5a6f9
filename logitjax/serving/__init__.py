"""A server with OpenAI's completion API over a decoder or an ensemble of them.

`build_app` makes an ASGI application of a model, which `Listening` serves. `ServerConfig` has its
limits and the policy of what it reports, and `Key` is an API key (`Key.read` reads keys from a
file). It needs the extra `serve`.
"""

from logitjax import storage

for _package in ("pydantic", "starlette", "prometheus_client", "llguidance", "uvicorn"):
    storage.require(_package, extra="serve")

from logitjax.serving._app import build_app as build_app  # noqa: E402
from logitjax.serving._config import ServerConfig as ServerConfig  # noqa: E402
from logitjax.serving._keys import Key as Key  # noqa: E402
from logitjax.serving._listen import Listening as Listening  # noqa: E402
