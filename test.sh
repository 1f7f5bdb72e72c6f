#!/usr/bin/env bash
# A smoke test: trains the tiny model for two steps and looks at what that left.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"

usage() {
	cat <<-'EOF'
		Usage: ./test.sh [--all]

		Trains the tiny model for two steps through ./train.sh, on this machine and with its GPU where
		there is one, and looks at what that left. About a minute.

		  --all    all tests of the project instead (make test); about twenty minutes
		  --help   this text
	EOF
}

fail() {
	printf '✗ %s\n' "$1" >&2
	printf 'What to do: read %s\n' "${2:-the lines above}" >&2
	exit 1
}

case ${1:-} in
"") ;;
-h | --help)
	usage
	exit 0
	;;
--all) exec make -C "$root" test ;;
*)
	echo "test.sh knows no $1." >&2
	echo "What to do: ./test.sh --help lists what it takes." >&2
	exit 2
	;;
esac

outputs="$(mktemp -d)"
trap 'rm -rf "$outputs"' EXIT
log="$outputs/output.txt"
echo "Training the tiny model for two steps"
"$root/train.sh" tiny --steps 2 --outputs "$outputs" >"$log" 2>&1 || {
	cat "$log" >&2
	fail "The run failed."
}

run="$(find "$outputs/logs" -mindepth 1 -maxdepth 1 -type d)"
check() {
	if "${@:2}" >/dev/null; then echo "✓ $1"; else
		cat "$log" >&2
		fail "Not so: $1"
	fi
}
two_steps() {
	[[ "$(wc -l <"$run/metrics.jsonl")" == 2 ]]
}
check "the run has completed" grep -q '"status": "completed"' "$run/result.json"
check "metrics of two steps" two_steps
check "accuracy before and after" grep -q accuracy "$run/evaluations.jsonl"
check "a page to read" test -s "$run/notebook.html"
check "a checkpoint" find -L "$outputs/checkpoints" -name manifest.json -printf x -quit
echo "All well."
