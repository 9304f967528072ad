#!/usr/bin/env bash
# test_numa.sh BUILD - runs the tests of several nodes of memory in a virtual machine that has two.
#
#   scripts/test_numa.sh build/cpu      needs build/cpu/tests/backend/test_cpu_experts; one minute
#
# Most machines have one node, on which tests see little more than what the system is asked for. The
# virtual machine is QEMU's, emulated (AVX2, no AVX-512), with Debian's kernel, two processors and
# 1.5 GB on each of two nodes, and nothing in it but this test, its libraries and a shell. It says
# where pages lie, and nothing about speed. On Debian, as root: it installs qemu-system-x86 where
# that is missing. Exit status: the test's.
set -euo pipefail
build=$(realpath "${1:?usage: test_numa.sh BUILD}")
filter=${2:-CpuNodes.*}
test=$(find "$build" -name test_cpu_experts -type f -perm -u+x | head -n 1)
[ -n "$test" ] || { echo "$build has no test_cpu_experts" >&2; exit 1; }
command -v qemu-system-x86_64 >/dev/null || apt-get install -qq -y --no-install-recommends qemu-system-x86 >/dev/null
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
kernel=$(apt-cache depends linux-image-cloud-amd64 | sed -n 's/.*Depends: \(linux-image-[^ ]*\)/\1/p' | head -n 1)
(cd "$work" && apt-get -qq download "$kernel" busybox-static 2>/dev/null)
for package in "$work"/*.deb; do dpkg -x "$package" "$work/unpacked"; done

root=$work/root
mkdir -p "$root"/{bin,proc,sys,dev,tmp}
cp "$work/unpacked/bin/busybox" "$root/bin/"
cp "$test" "$root/test"
ldd "$test" | grep -o '/[^ ]*' | while read -r library; do
  mkdir -p "$root$(dirname "$library")" && cp -L "$library" "$root$library"
done
cat >"$root/init" <<INIT
#!/bin/busybox sh
/bin/busybox mount -t proc proc /proc; /bin/busybox mount -t sysfs sys /sys; /bin/busybox mount -t tmpfs tmp /tmp
for node in /sys/devices/system/node/node*; do echo "\$node: processors \$(/bin/busybox cat \$node/cpulist)"; done
/test --gtest_color=no --gtest_filter='$filter'; echo "status \$?"
/bin/busybox poweroff -f
INIT
chmod +x "$root/init"
(cd "$root" && find . | ./bin/busybox cpio -o -H newc | gzip -1) >"$work/initramfs"

timeout 900 qemu-system-x86_64 -cpu max -smp 4 -m 3072 -display none -no-reboot -serial stdio \
  -object memory-backend-ram,id=m0,size=1536M -numa node,nodeid=0,cpus=0-1,memdev=m0 \
  -object memory-backend-ram,id=m1,size=1536M -numa node,nodeid=1,cpus=2-3,memdev=m1 \
  -kernel "$work"/unpacked/boot/vmlinuz-* -initrd "$work/initramfs" -append 'console=ttyS0 quiet panic=-1' </dev/null |
  tee "$work/log"
grep -q '^status 0' "$work/log"
