"""Generation with key/value caches."""

from logitjax.decoding._greedy import greedy_generate as greedy_generate
