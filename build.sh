#!/usr/bin/env bash
# Makes what ./train.sh runs in: the Docker image where there is Docker, else .venv.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

usage() {
	cat <<-'EOF'
		Usage: ./build.sh [--docker | --local]

		Makes what ./train.sh and ./test.sh run in.

		  --docker   the image `kit`, from the Dockerfile; for machines with Docker
		  --local    the environment .venv, with Python 3.11 or 3.12; needs no root and 10 GB of disk
		  --help     this text

		Without an option it takes Docker where it answers and the machine has an NVIDIA GPU that
		containers see, else .venv. Both can be there; ./train.sh takes .venv first.
	EOF
}

die() {
	printf '%s\n' "$@" >&2
	exit 2
}

has_docker() {
	command -v docker >/dev/null && docker info >/dev/null 2>&1
}

how=
for word in "$@"; do
	case $word in
	--docker | --local) how=${word#--} ;;
	-h | --help)
		usage
		exit 0
		;;
	*) die "build.sh knows no $word." "What to do: ./build.sh --help lists what it takes." ;;
	esac
done

if [[ -z $how ]]; then
	how=local
	if has_docker; then how=docker; fi
fi

if [[ $how == docker ]]; then
	has_docker || die "Docker does not answer here." \
		"What to do: start it, or join its group (docker info says more); or ./build.sh --local."
	echo "Building the image kit (about 20 GB; the first time takes a while)"
	docker build --tag kit .
else
	command -v make >/dev/null || die "make is not installed." \
		"What to do: on Debian and Ubuntu, install the package make."
	make .venv/.kit
fi

echo "Ready. Next: ./test.sh for a smoke test, ./train.sh to train with config.yaml."
if command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; then
	echo "For the GPU here: hf download Qwen/Qwen3-0.6B gets the weights that config.yaml names."
fi
