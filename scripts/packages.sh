#!/usr/bin/env bash
# Installs the system packages that are missing: packages.sh NAME…
# A name may be COMMAND=PACKAGE: then the package counts as there when the
# command is, wherever it came from.
set -euo pipefail

missing=()
for name in "$@"; do
	case $name in
	*=*) command -v "${name%%=*}" >/dev/null || missing+=("${name#*=}") ;;
	*)
		if ! command -v dpkg-query >/dev/null; then
			missing+=("$name")
		elif [ "$(dpkg-query -W -f '${db:Status-Status}' "$name" 2>/dev/null)" != installed ]; then
			missing+=("$name")
		fi
		;;
	esac
done
[ ${#missing[@]} -gt 0 ] || exit 0

if ! command -v apt-get >/dev/null; then
	echo "This is no Debian or Ubuntu. Install what stands for these packages here, and run it again: ${missing[*]}" >&2
	echo "To go on without the check: make SKIP_PACKAGES=1 …" >&2
	exit 1
fi
if [ "$(id -u)" != 0 ]; then
	echo "Missing system packages: ${missing[*]}. Run it as root, or: sudo apt-get install ${missing[*]}" >&2
	exit 1
fi
echo "Installing system packages: ${missing[*]}"
apt-get update -q
DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends "${missing[@]}"
