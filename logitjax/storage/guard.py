"""Limits on what a file may ask of its reader (`logitjax.storage._guard`), for other packages."""

from logitjax.storage._guard import LIMITS as LIMITS
from logitjax.storage._guard import Limits as Limits
from logitjax.storage._guard import Reader as Reader
from logitjax.storage._guard import aligned as aligned
from logitjax.storage._guard import apart as apart
from logitjax.storage._guard import gunzip as gunzip
from logitjax.storage._guard import naming as naming
from logitjax.storage._guard import one_line as one_line
from logitjax.storage._guard import parse_json as parse_json
from logitjax.storage._guard import plain_file as plain_file
from logitjax.storage._guard import read_bytes as read_bytes
from logitjax.storage._guard import read_text as read_text
from logitjax.storage._guard import short as short
from logitjax.storage._guard import whole as whole
