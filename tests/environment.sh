# Sourced by the scripts whose tests need an environment of their own: . tests/environment.sh "$folder"
# Sets venv to the folder; where it is empty, to a temporary one, which is deleted at the end. Makes the
# environment if it is not there, by the function install of the script, which may be stopped and run again.
venv=${1:-}
if [ -z "$venv" ]; then
    venv=$(mktemp -d)/venv
    trap 'rm -rf "$(dirname "$venv")"' EXIT
fi
if [ ! -e "$venv/ready" ]; then
    python3 -m venv "$venv"
    install
    touch "$venv/ready"
fi
export PYTHONPATH=$PWD OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
