"""A plugin of pytest (`-p unsloth_first`) that imports Unsloth before the tests do transformers, which it patches."""

from job.model.load import import_first

import_first("unsloth")
