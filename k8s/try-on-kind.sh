#!/bin/sh
# Tries the manifests on a cluster of kind: admits every overlay, runs the demo, takes its pod away once, and waits for the result.
#
#     k8s/try-on-kind.sh              # needs kind, kubectl, and docker or podman; a quarter of an hour on two cores
#     KEEP=1 k8s/try-on-kind.sh       # leaves the cluster
#
# It makes a cluster called vision-lora-try and deletes it at the end. No other context of kubectl is touched.
set -eu
cd "$(dirname "$0")/.."
cluster=vision-lora-try image=docker.io/library/vision-lora-job:0.2.0-cpu # as a pod would read its short name
for tool in kind kubectl; do command -v $tool >/dev/null || { echo "There is no $tool here; install it." >&2; exit 1; }; done
builder=docker
docker version >/dev/null 2>&1 || builder=podman KIND_EXPERIMENTAL_PROVIDER=podman
export KIND_EXPERIMENTAL_PROVIDER="${KIND_EXPERIMENTAL_PROVIDER:-}"
folder=$(mktemp -d)
export KUBECONFIG="$folder/config"
trap '[ -n "${KEEP:-}" ] || kind delete cluster --name $cluster; rm -f "$folder/image.tar"; [ -n "${KEEP:-}" ] || rm -rf "$folder"' EXIT
say() { echo "try-on-kind: $*"; }
kube() { kubectl -n vision-lora "$@"; }

say "building $image with $builder"
BUILDER=$builder docker/build.sh --build-arg VARIANT=cpu --tag "$image"
"$builder" save --output "$folder/image.tar" "$image"
kind create cluster --name $cluster --wait 180s
kind load image-archive "$folder/image.tar" --name $cluster

kubectl apply -f k8s/setup/namespace.yaml
kube apply -k k8s/setup
for overlay in k8s/overlays/*; do
    case $overlay in */dev) continue ;; */trainjob) kubectl get crd trainjobs.trainer.kubeflow.org >/dev/null 2>&1 || continue ;; esac
    kube create --dry-run=server --validate=strict -k "$overlay" >/dev/null
    say "$overlay is admitted"
done

kube apply -k k8s/overlays/dev
say "waiting until the demo trains"
tries=0
until kube logs job/vision-lora -c job 2>/dev/null | grep -q 'train: step'; do
    tries=$((tries + 1))
    if [ $tries = 180 ]; then kube describe pods; exit 1; fi
    sleep 5
done
say "taking its pod away"
kube delete pod -l batch.kubernetes.io/job-name=vision-lora --wait=false
kube wait --for=condition=complete --timeout=30m job/vision-lora || { kube describe job/vision-lora; exit 1; }
kube logs job/vision-lora -c job | tail -n 3
[ -z "${KEEP:-}" ] || say "the cluster stays: KUBECONFIG=$KUBECONFIG kubectl -n vision-lora get pods; kind delete cluster --name $cluster"
