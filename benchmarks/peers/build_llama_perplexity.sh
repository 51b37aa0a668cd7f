#!/usr/bin/env bash
# Builds llama-perplexity and llama-bench from the llama.cpp that the installed llama-cpp-python was compiled from.
#
# llama-cpp-python ships as a source archive with its llama.cpp in vendor/. Building the tools from that copy,
# with ggml's own defaults as in the wheel (Release, GGML_NATIVE, OpenMP), gives the same kernels in both,
# so a difference in perplexity or speed is one of the programs around them.
# Needs cmake, a C++ compiler and about 6 CPU minutes. Result: .work/llama.cpp/build/bin/llama-{perplexity,bench}
#
#   bash benchmarks/peers/build_llama_perplexity.sh [python of the environment with llama-cpp-python]
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${1:-.venv/bin/python}
jobs=${JOBS:-$(nproc)}
version=$("$python" -c 'from importlib.metadata import version; print(version("llama-cpp-python"))')
work=.work/llama.cpp
archive=$work/llama_cpp_python-$version.tar.gz
source=$work/llama_cpp_python-$version/vendor/llama.cpp
mkdir -p "$work"

[ -f "$archive" ] || "$python" -m pip download --quiet --no-deps --no-binary llama-cpp-python \
    --dest "$work" "llama-cpp-python==$version"
[ -f "$source/CMakeLists.txt" ] || tar -xzf "$archive" -C "$work"

cmake -S "$source" -B "$work/build" -DCMAKE_BUILD_TYPE=Release -DBUILD_SHARED_LIBS=OFF \
    -DLLAMA_BUILD_TOOLS=ON -DLLAMA_BUILD_COMMON=ON -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF \
    -DLLAMA_BUILD_SERVER=OFF -DLLAMA_BUILD_APP=OFF -DLLAMA_CURL=OFF -DLLAMA_OPENSSL=OFF
nice -n 10 cmake --build "$work/build" --target llama-perplexity llama-bench --parallel "$jobs"
"$work/build/bin/llama-perplexity" --version
ls "$work/build/bin/llama-bench"
