# Runs as root inside the freshly bootstrapped system, alone in namespaces of its
# own. PACKAGES and SOURCE_DATE_EPOCH are in the environment; file descriptor 3
# takes apt's status lines. This text is part of the recipe's hash.
set -eu

mount -t proc proc /proc

printf '#!/bin/sh\nexit 101\n' >/usr/sbin/policy-rc.d # no service starts during a build
chmod 755 /usr/sbin/policy-rc.d

apt-get update -q
apt-get install -q -y --no-install-recommends -o APT::Status-Fd=3 -o Dpkg::Use-Pty=0 $PACKAGES
rm /usr/sbin/policy-rc.d

useradd --create-home --uid 1000 --user-group --groups sudo --shell /bin/bash user
chmod 755 /home/user
printf 'user ALL=(ALL:ALL) NOPASSWD: ALL\n' >/etc/sudoers.d/user
chmod 440 /etc/sudoers.d/user
visudo -cq

# The runtime mounts the guest agent over this; it would make the file, here
# where nothing may change any more, if it were missing.
install -m 755 /dev/null /usr/bin/envd

update-ca-certificates
chown -R user:user /usr/local # so that pip and npm install for everyone without sudo

# File capabilities are extended attributes, which a shared root filesystem need
# not carry into the sandbox; the mode does.
setcap -r /usr/bin/ping
chmod u+s /usr/bin/ping

# What bootstrapping brought before the exclusions were there.
find /usr/share/doc -mindepth 1 ! -type d ! -name copyright -delete
find /usr/share/info /usr/share/locale /usr/share/man -mindepth 1 -delete
find /usr/share/doc -type d -empty -delete

# Logs, caches and whatever says when or where the build ran.
apt-get clean
rm -rf /var/lib/apt/lists/* /var/cache/apt/* /var/cache/debconf/*-old /var/cache/ldconfig/* \
	/var/lib/dpkg/*-old /var/tmp/* /tmp/* /debootstrap \
	/etc/passwd- /etc/group- /etc/shadow- /etc/gshadow- /etc/subuid- /etc/subgid- /etc/.pwd.lock \
	/etc/apt/apt.conf.d/*proxy* /root/.wget-hsts
find /run /var/log -type f -delete
mkdir -p /var/cache/apt/archives/partial /var/lib/apt/lists/partial
day=$((SOURCE_DATE_EPOCH / 86400))
sed -i -E "s/^([^:]*:[^:]*):[0-9]+:/\1:$day:/" /etc/shadow
: >/etc/machine-id
: >/etc/resolv.conf
printf 'localhost\n' >/etc/hostname
printf '127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n' >/etc/hosts
umount /proc
rm -rf /run/mount
