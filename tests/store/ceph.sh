#!/bin/sh
# Runs a command against a real Ceph RGW on loopback, once over http and once over https:
#
#     sh tests/store/ceph.sh python -m pytest tests/store tests/checkpoint
#
# As root on Debian. Takes ceph-mon, ceph-osd and radosgw from the machine, or from the folder CEPH_CHROOT when it is
# set (mmdebstrap of a newer suite, with /proc and /dev mounted; Ceph 20 checks more than Debian 12's 16), and otherwise
# installs them. The command gets the AWS_ variables, TEST_S3_SERVER=ceph and TEST_S3_VERSION. CEPH_SCHEMES=http leaves out the second run.
set -eu

root=${CEPH_CHROOT:-}
in_root() { if [ -n "$root" ]; then chroot "$root" "$@"; else "$@"; fi; }
start() { if [ -n "$root" ]; then exec chroot "$root" "$@"; else exec "$@"; fi; } # in the background: its pid is the daemon's
in_root sh -c 'command -v radosgw && command -v ceph-mon && command -v ceph-osd' >/dev/null ||
    apt-get install -y -qq --no-install-recommends ceph-mon ceph-osd radosgw ceph-common openssl >/dev/null

d=$(mktemp -d "$root/tmp/ceph.XXXXXX")
c=${d#"$root"} # the same folder as Ceph sees it
pids=
# shellcheck disable=SC2317,SC2329  # called by the trap
stop() {
    # shellcheck disable=SC2086  # a list
    [ -z "$pids" ] || kill -9 $pids 2>/dev/null || true
    wait || true
    rm -rf "$d"
}
trap stop EXIT
trap 'exit 130' INT TERM
chmod 755 "$d"
mkdir "$d/mon" "$d/osd"

openssl req -x509 -newkey rsa:2048 -nodes -days 30 -subj /CN=localhost -addext subjectAltName=DNS:localhost,IP:127.0.0.1 \
    -keyout "$d/key.pem" -out "$d/cert.pem" 2>/dev/null
cat >"$d/ceph.conf" <<END
[global]
fsid = $(cat /proc/sys/kernel/random/uuid)
mon host = 127.0.0.1:${CEPH_PORT:-16789}
mon initial members = a
keyring = $c/keyring
run dir = $c
admin socket = $c/\$name.asok
log file = $c/\$name.log
pid file = $c/\$name.pid
crash dir = $c
mon data = $c/mon
osd data = $c/osd
osd objectstore = memstore
memstore device bytes = ${CEPH_BYTES:-8589934592}
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 4
osd crush chooseleaf type = 0
mon allow pool size one = true
mon data avail warn = 1
mon data avail crit = 0
rgw gc obj min wait = 1
rgw gc processor period = 2
rgw gc processor max time = 2
rgw crypt require ssl = false
rgw crypt s3 kms backend = testing
rgw crypt s3 kms encryption keys = testkey=$(head -c 32 /dev/zero | base64)
rgw frontends = beast endpoint=127.0.0.1:${RGW_HTTP:-18000} ssl_endpoint=127.0.0.1:${RGW_HTTPS:-18443} ssl_certificate=$c/cert.pem ssl_private_key=$c/key.pem
END
conf="-c $c/ceph.conf --setuser root --setgroup root"

# shellcheck disable=SC2086  # $conf is a list
{
    in_root ceph-authtool --create-keyring "$c/keyring" --gen-key -n mon. --cap mon 'allow *' >"$d/setup.log"
    for name in client.admin osd.0; do
        in_root ceph-authtool "$c/keyring" --gen-key -n $name --cap mon 'allow *' --cap osd 'allow *' --cap mgr 'allow *'
    done
    in_root ceph-mon $conf --mkfs -i a --keyring "$c/keyring" >>"$d/setup.log" 2>&1
    start ceph-mon $conf -f -i a >"$d/mon.out" 2>&1 &
    pids="$pids $!"
    id=$(in_root ceph -c "$c/ceph.conf" --connect-timeout 30 osd create)
    in_root ceph-osd $conf -i "$id" --mkfs >>"$d/setup.log" 2>&1
    start ceph-osd $conf -f -i "$id" >"$d/osd.out" 2>&1 &
    pids="$pids $!"
    start radosgw $conf -f -n client.admin >"$d/rgw.out" 2>&1 &
    pids="$pids $!"
}
tries=0
until curl -s -o /dev/null "http://127.0.0.1:${RGW_HTTP:-18000}/"; do
    tries=$((tries + 1))
    if [ $tries -gt 90 ]; then
        tail -n 5 "$d"/*.out "$d"/*.log >&2
        exit 69
    fi
    sleep 1
done
export AWS_ACCESS_KEY_ID=tester AWS_SECRET_ACCESS_KEY=testersecret AWS_DEFAULT_REGION=us-east-1 TEST_S3_SERVER=ceph
in_root radosgw-admin -c "$c/ceph.conf" user create --uid tester --display-name tester \
    --access-key "$AWS_ACCESS_KEY_ID" --secret-key "$AWS_SECRET_ACCESS_KEY" >>"$d/setup.log" 2>&1
TEST_S3_VERSION=$(in_root radosgw --version | cut -d ' ' -f 1-3)
export TEST_S3_VERSION
echo "$TEST_S3_VERSION"

for scheme in ${CEPH_SCHEMES:-http https}; do
    echo "== $scheme: $*"
    if [ "$scheme" = https ]; then
        export AWS_CA_BUNDLE="$d/cert.pem" AWS_ENDPOINT_URL_S3="https://localhost:${RGW_HTTPS:-18443}"
    else
        export AWS_ENDPOINT_URL_S3="http://127.0.0.1:${RGW_HTTP:-18000}"
    fi
    "$@"
done
