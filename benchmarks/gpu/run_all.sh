#!/usr/bin/env bash
# One call of a borrowed GPU machine: setup | codec | codec2 | model | vllm | serving [its arguments].
# Each ends by itself below ten minutes, goes on after a failure, and ends with status 1 if there
# was one. Rows: $OUT/CALL.json (default build/gpu). Unpacked packages stay in $TARGET (default
# build/device-packages) for the next call; $SOURCES: folder of archives and wheels to unpack
# before (default build/device/CALL, if it is there).
set -u
cd "$(dirname "$0")/../.."
call=${1:?setup, codec, codec2, model, vllm or serving}
shift
OUT=${OUT:-build/gpu}
TARGET=${TARGET:-build/device-packages}
SOURCES=${SOURCES:-build/device/$call}
PYTHON=${PYTHON:-python3}
ROWS=$OUT/$call.json
export PYTHONUNBUFFERED=1
mkdir -p "$OUT"
status=0

step() { # LIMIT_SECONDS COMMAND...
  local limit=$1 began=$SECONDS code
  shift
  echo "=== $*"
  timeout --kill-after=10 "$limit" "$@"
  code=$?
  echo "=== status $code after $((SECONDS - began)) s: $*"
  if [ "$code" -ne 0 ]; then status=1; fi
}

bench() { # LIMIT_SECONDS NAME ARGUMENTS...
  local limit=$1 name=$2
  shift 2
  step "$limit" "$PYTHON" -m "benchmarks.gpu.$name" --out "$ROWS" "$@"
}

setup() {
  local found=()
  if [ -e "$SOURCES" ]; then found=("$SOURCES"); fi
  local exports
  exports=$("$PYTHON" -m benchmarks.gpu.bundle "$TARGET" "${found[@]}") || status=1
  eval "$exports"
}

setup
case $call in
  setup) ;;
  codec) # at most 560 s
    bench 60 roofline llama-3.1-8b 16 --rounds 3
    step 80 "$PYTHON" -m benchmarks.gpu.smoke
    step 130 "$PYTHON" -m pytest -q -m gpu -p no:cacheprovider tests/codec
    bench 60 raw_copy
    bench 230 codec_stages
    ;;
  codec2) # at most 540 s
    step 80 "$PYTHON" -m benchmarks.gpu.smoke
    step 130 "$PYTHON" -m pytest -q -m gpu -p no:cacheprovider tests/codec/kernels -k "kvtc2 or step"
    bench 50 codec_stages --shape llama-3.1-8b
    bench 230 codec_stages --codec kvtc2
    bench 50 codec_stages --codec kvtc2 --kv-basis shared --layers 4
    ;;
  model) # at most 270 s
    bench 90 recompute
    bench 90 interference
    bench 90 interference --prefer-model
    ;;
  vllm) # at most 520 s, if every one of its four engines hangs
    bench 520 vllm_smoke
    ;;
  serving) # at most 540 s
    bench 540 serving --seconds 520 "$@"
    ;;
  *)
    echo "unknown call: $call" >&2
    exit 2
    ;;
esac
exit $status
