#!/usr/bin/env bash
# Trains with a configuration file, and leaves everything in outputs/.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"

usage() {
	cat <<-'EOF'
		Usage: ./train.sh [CONFIG] [options]

		Trains with CONFIG, a YAML file or a preset's name; config.yaml where none is given.

		  -p NAME VALUE   another value for a parameter of the run: steps, seed, evaluate, export
		  --steps N       the same as -p steps N
		  --config FILE   the same as CONFIG
		  --outputs DIR   where everything goes; outputs/ where none is given
		  --dry-run       only say what is missing for it on this machine, and what would run
		  --docker        train in the image that ./build.sh --docker made
		  --help          this text

		It leaves
		  outputs/logs/TIME.../          the run: executed notebook, page, metrics, result.json
		  outputs/checkpoints/TIME.../   its checkpoints; RLSession.load continues from one
		  outputs/wandb/TIME.../         its Weights & Biases files, where config.yaml asks for them

		It is the same as `kit run notebooks/11_train_with_config.ipynb -p config CONFIG`. Exit
		codes: 0 done, 1 the run failed, 2 a wrong call, 130 interrupted.
	EOF
}

die() {
	printf '%s\n' "$@" >&2
	exit 2
}

config=
outputs="$root/outputs"
where=
dry=
parameters=()
while (($#)); do
	case $1 in
	-h | --help)
		usage
		exit 0
		;;
	--dry-run) dry=yes ;;
	--docker) where=docker ;;
	-p | --parameter)
		(($# > 2)) || die "$1 wants a name and a value." "What to do: write -p steps 20."
		parameters+=(-p "$2" "$3")
		shift 2
		;;
	--config | --outputs | --steps)
		(($# > 1)) || die "$1 wants a value." "What to do: ./train.sh --help shows which."
		case $1 in
		--config) config=$2 ;;
		--outputs) outputs=$2 ;;
		--steps) parameters+=(-p steps "$2") ;;
		esac
		shift
		;;
	-*) die "train.sh knows no $1." "What to do: ./train.sh --help lists what it takes." ;;
	*)
		[[ -z $config ]] || die "Two configurations were given: $config and $1." \
			"What to do: give one."
		config=$1
		;;
	esac
	shift
done

config=${config:-$root/config.yaml}
if [[ $config == *.yaml || $config == *.yml ]]; then
	[[ -f $config ]] || die "There is no configuration file $config." \
		"What to do: check the path; config.yaml is one to begin with."
	config="$(realpath "$config")"
fi
mkdir -p "$outputs"/{checkpoints,logs,wandb} || die "What to do: choose another --outputs."
outputs="$(realpath "$outputs")"

python="${KIT_PYTHON:-$root/.venv/bin/python}"
if [[ $where == docker || ! -x $python ]]; then
	if ! command -v docker >/dev/null || ! docker image inspect kit >/dev/null 2>&1; then
		die "There is nothing to train with here yet: neither .venv nor the image kit." \
			"What to do: ./build.sh makes one of them."
	fi
	gpus=()
	if command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; then gpus=(--gpus all); fi
	mounts=(-v "$outputs:/home/kit/work/outputs")
	mounts+=(-v "${HF_HOME:-$HOME/.cache/huggingface}:/home/kit/.cache/huggingface")
	if [[ -f $config ]]; then
		mounts+=(-v "$config:/home/kit/work/given.yaml:ro")
		config=given.yaml
	fi
	if [[ -n $dry ]]; then parameters+=(--dry-run); fi
	exec docker run --rm "${gpus[@]}" --network host --ipc host "${mounts[@]}" kit \
		./train.sh "$config" "${parameters[@]}"
fi

command=("$python" -m kit run "$root/notebooks/11_train_with_config.ipynb"
	-p config "$config" "${parameters[@]}" --out "$outputs/logs")
if [[ -n $dry ]]; then
	echo "Would run: ${command[*]}"
	exec "$python" -m kit doctor "$config"
fi

# What a run leaves is in its own folder; these lead there by kind.
# shellcheck disable=SC2317 # called by the trap
show_by_kind() {
	local run name kind
	for run in "$outputs"/logs/*/; do
		name="$(basename "$run")"
		for kind in checkpoints wandb; do
			if [[ -d $run$kind ]]; then
				ln -sfn "../logs/$name/$kind" "$outputs/$kind/$name"
			fi
		done
		if [[ -d ${run}checkpoint ]]; then
			ln -sfn "../logs/$name/checkpoint" "$outputs/checkpoints/$name"
		fi
	done
}
trap show_by_kind EXIT
trap : INT # the run ends by itself then, and keeps what it has

status=0
"${command[@]}" || status=$?
exit "$status"
