"""Articles with a topic: a model's knowledge beside the facts it is taught."""

import numpy as np

from logitjax import data


def topic_articles(source: str, count: int) -> tuple[list[str], list[tuple[str, int]]]:
    """Test articles of a source in a fixed order.

    Returns:
        The names of all topics, and for each article its text and the number of its topic.

    Raises:
        ValueError: The source has no topics.
    """
    test = data.load_examples(source, split="test")
    if "topic" not in test[0]:
        raise ValueError(f"topics: expected data with topics, {source} has none")
    names = sorted({test[i]["topic"] for i in range(len(test))})
    order = np.random.default_rng(0).permutation(len(test))[:count]
    articles = [test[int(i)] for i in order]
    return names, [(row["text"], names.index(row["topic"])) for row in articles]
