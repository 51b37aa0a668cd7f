"""Whether a model fits into this machine's memory, said before its engine takes minutes to find out.

The backend predicts, from headers and config alone; a model that cannot fit becomes a failed record with the
predicted figures. Where the estimates leave it open, the engine is started.
"""

from evalq.data.windows import WindowPlan
from evalq.engine.backend import LoadRequest, Machine, Prediction
from evalq.errors import ModelError, SpecError
from evalq.machine import environment
from evalq.run.prepare_model import PreparedModel
from evalq.run.steps import step_tokens


def predict(model: PreparedModel, plan: WindowPlan) -> Prediction | None:
    """What the model's backend expects of this machine; None where it cannot tell."""
    if model.files.overlay is not None:
        return None
    request = LoadRequest(
        path=model.files.path,
        window_tokens=plan.longest_tokens,
        targets_per_window=plan.most_targets,
        options=model.engine.options,
        load_fn=model.spec.load_fn,
        n_windows=len(plan.windows),
        adapter=model.adapter,
        step_tokens=step_tokens(model.engine.options, [plan]),
    )
    try:
        return model.engine.loader.predict(request, _machine(model))
    except SpecError:  # no planner for this kind of checkpoint
        return None


def require_fit(prediction: Prediction | None) -> None:
    """Raise ModelError with the predicted figures for a model that cannot fit."""
    if prediction is not None and prediction.category is not None:
        raise ModelError(
            f"predicted, not tried: {prediction.verdict}",
            prediction.category,
            "evalq plan says what would fit; --try-anyway starts the engine all the same",
        )


def _machine(model: PreparedModel) -> Machine:
    found = environment()
    gpus = tuple((str(gpu["name"]), float(gpu["memory_gib"])) for gpu in found["gpus"])
    return Machine(gpus, float(found["ram_gib"]), model.versions)
