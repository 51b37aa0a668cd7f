#!/usr/bin/env bash
# Creates .work/lm-eval, an environment of its own with lm-evaluation-harness.
#
# lm-eval brings some fifty packages that evalq does not need; torch and transformers are the versions that
# evalq runs with here, so that both time the same kernels.
#
#   bash benchmarks/peers/make_lm_eval_env.sh [python of the environment with evalq]
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${1:-.venv/bin/python}
pins=$("$python" - <<'PY'
from importlib.metadata import version
for name in ("torch", "transformers", "accelerate", "psutil"):
    print(f"{name}=={version(name).split('+')[0]}")
PY
)
"$python" -m venv .work/lm-eval
# shellcheck disable=SC2086
.work/lm-eval/bin/python -m pip install --quiet --disable-pip-version-check $pins lm-eval==0.4.13
# A torchvision or torchaudio built for another torch breaks `import transformers`, and none is needed here.
.work/lm-eval/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
.work/lm-eval/bin/python -c 'import lm_eval, torch; print("lm-eval", lm_eval.__version__, "torch", torch.__version__)'
