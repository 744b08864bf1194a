#!/bin/sh
# Builds the archive of `kubectl vcpuset` for krew, and its manifest: build.sh DIRECTORY
#
# The archive contains the program and its dependencies as pip installs them, so it is for this platform and for this minor
# version of Python. PYTHON=… chooses another interpreter.
set -eu

if [ $# -ne 1 ]; then
  echo "usage: $0 DIRECTORY (to which vcpuset.tar.gz and vcpuset.yaml are written)" >&2
  exit 2
fi
mkdir -p "$1"
out=$(cd "$1" && pwd)
python=${PYTHON:-python3}
here=$(cd "$(dirname "$0")" && pwd)
source=$(dirname "$(dirname "$here")")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

"$python" -m pip install --quiet --no-compile --constraint "$source/constraints.txt" --target "$work/lib" "$source"
rm -rf "$work/lib/bin"
version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
for program in kubectl-vcpuset:run kubectl_complete-vcpuset:complete; do
  file="$work/${program%:*}" function=${program#*:}
  cat >"$file" <<END
#!/bin/sh
# krew links here.
exec python$version -I -c 'import sys; sys.path.insert(0, sys.argv.pop(1)); from vcpuset.cli.kubectl.main import $function; $function()' \\
  "\$(dirname "\$(readlink -f "\$0")")/lib" "\$@"
END
  chmod 755 "$file"
done
cp "$source/LICENSE" "$work/"
tar --create --gzip --file "$out/vcpuset.tar.gz" --owner=0 --group=0 --directory "$work" .
sum=$(sha256sum "$out/vcpuset.tar.gz" | cut -d ' ' -f 1)
case $(uname -m) in aarch64) arch=arm64 ;; *) arch=amd64 ;; esac
sed "s/\"0\{64\}\"/\"$sum\"/; s/arch: amd64/arch: $arch/" "$here/vcpuset.yaml" >"$out/vcpuset.yaml"
echo "$out/vcpuset.tar.gz, for Python $version"
