"""One model of lm-evaluation-harness on local tasks, in a process of its own.

Run as ``python _judges_worker.py ORDER``: a JSON file of model, model_args, tasks, their directory
and where the answer goes. It needs `lm_eval`, and of this repository only what the model needs.
"""

import json
import pathlib
import sys
import time


def main(order: dict) -> None:
    import lm_eval
    from lm_eval.tasks import TaskManager

    if order["model"] == "logitjax":
        import logitjax.integrations.lm_eval  # noqa: F401
    start = time.perf_counter()
    evaluation = lm_eval.simple_evaluate(
        model=order["model"],
        model_args=order["model_args"],
        tasks=order["tasks"],
        task_manager=TaskManager(include_path=order["directory"], include_defaults=False),
        batch_size=order["batch_size"],
        bootstrap_iters=0,
        log_samples=True,
    )
    assert evaluation is not None
    metrics = {
        task: {
            name.removesuffix(",none"): value
            for name, value in values.items()
            if isinstance(value, int | float) and "stderr" not in name and name != "sample_len"
        }
        for task, values in evaluation["results"].items()
    }
    answers = {
        task: [sample["resps"] for sample in sorted(samples, key=lambda one: one["doc_id"])]
        for task, samples in evaluation["samples"].items()
    }
    answer = {"metrics": metrics, "answers": answers, "seconds": time.perf_counter() - start}
    pathlib.Path(order["answer"]).write_text(json.dumps(answer, default=str))


if __name__ == "__main__":
    main(json.loads(pathlib.Path(sys.argv[1]).read_text()))
