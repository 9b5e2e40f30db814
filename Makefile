# What to type: make up, make down, make test. The rest is for developers.
#
#   DATA=DIR          where the platform keeps everything (default /var/lib/wrenn)
#   LISTEN=HOST:PORT  address of the API (default localhost:7080)
#   UP_FLAGS="…"      further flags of `wrenn up`
#   SKIP_PACKAGES=1   do not look for missing system packages
#   SEED=N KILLS=N    of `make chaos`
#   BENCH="NAME…"     what `make bench` measures (default: everything)

DATA   ?= $(or $(WRENN_DATA),/var/lib/wrenn)
LISTEN ?= localhost:7080
BENCH  ?= lifecycle density churn envd terminal proxy memory

# Both are found out when first needed, and once.
GO      = $(eval GO := $$(shell scripts/go.sh))$(GO)
VERSION = $(eval VERSION := $$(shell git describe --tags --always 2>/dev/null))$(VERSION)
GVISOR := $(shell awk '$$1 == "gvisor.dev/gvisor" { print $$2; exit }' go.mod)

LDFLAGS = -s -w -X main.version=$(VERSION) -X gvisor.dev/gvisor/runsc/version.version=$(GVISOR)

# Directories are among the sources so that a deleted file counts as a change.
sources = $(shell find $(wildcard $(1)) -mindepth 1 ! -name '*_test.go' ! -path '*/guest/bin/*' ! -path '*/kernel/bin/*' ! -path '*/testdata*')
ENVD_SOURCES  := go.mod go.sum $(call sources,cmd/envd internal/envd api/proto)
BOOT_SOURCES := go.mod go.sum $(call sources,cmd/guestboot)
WRENN_SOURCES := go.mod go.sum $(call sources,cmd/wrenn internal api bench web)

GOLANGCI_VERSION := v2.15.0
BUF_VERSION      := v1.75.0
PROTOC_GEN_GO    := v1.36.12
PROTOC_GEN_CONNECT := v1.21.1

export GOTOOLCHAIN := auto

.DELETE_ON_ERROR:
.PHONY: up down build packages test test-packages test-reproducible test-firecracker soak chaos fuzz lint bench generate clean

up: packages build
	@bin/wrenn up --detach --data $(DATA) --listen $(LISTEN) $(UP_FLAGS)

down:
	@[ -x bin/wrenn ] || $(MAKE) build
	@bin/wrenn down --data $(DATA)

build: bin/wrenn

bin/wrenn: internal/guest/bin/envd internal/runtime/microvm/kernel/bin/guestboot $(WRENN_SOURCES)
	@echo "building $@ (the first time takes some minutes: the sandbox kernel is in it)"
	@CGO_ENABLED=0 $(GO) build -trimpath -ldflags '$(LDFLAGS)' -o $@ ./cmd/wrenn
	@touch $@

internal/guest/bin/envd: $(ENVD_SOURCES)
	@echo "building $@"
	@CGO_ENABLED=0 $(GO) build -trimpath -ldflags '-s -w' -o $@ ./cmd/envd
	@touch $@

internal/runtime/microvm/kernel/bin/guestboot: $(BOOT_SOURCES)
	@echo "building $@"
	@CGO_ENABLED=0 $(GO) build -trimpath -ldflags '-s -w' -o $@ ./cmd/guestboot
	@touch $@

packages:
ifndef SKIP_PACKAGES
	@scripts/packages.sh debootstrap debian-archive-keyring ca-certificates libnss-myhostname
endif

test-packages: packages
ifndef SKIP_PACKAGES
	@scripts/packages.sh qemu-system-x86 xfsprogs btrfs-progs zstd curl git sudo python3 python3-venv gcc libc6-dev node=nodejs npm=npm chromium=chromium
endif

test: test-packages build
	@GO="$(GO)" scripts/test.sh

# Builds the base template twice and compares; looks at what is in it.
test-reproducible: packages
	WRENN_TEST_REPRODUCIBLE=1 CGO_ENABLED=0 $(GO) test -count=1 -v -timeout 30m -run TestBaseTemplate ./internal/template

# The driver on a real Firecracker, which FIRECRACKER_BIN names, and on its jailer, beside
# it, in PATH or named by WRENN_JAILER: with a guest of a few instructions where KVM opens,
# and with the contract of a runtime where KVM boots Linux. Without, it says what is
# missing. `make test` has a fake.
test-firecracker: test-packages build
	FIRECRACKER_BIN="$${FIRECRACKER_BIN:-$$(command -v firecracker)}" CGO_ENABLED=0 $(GO) test -count=1 -v -timeout 30m ./internal/runtime/microvm/firecracker

# 100,000 processes, 1,000 terminals and 10,000 watches on one guest agent: some
# minutes. `make test` has a short form of it.
soak:
	WRENN_SOAK=full CGO_ENABLED=0 $(GO) test -count=1 -v -timeout 60m -run '^TestSoak' ./internal/envd

# Kills host agent, control plane and engines at random while eight clients use them,
# KILLS times: half an hour. `make test` has a short form of it. SEED=… replays a run.
KILLS ?= 300
chaos: packages build
	cd test/e2e && CHAOS_KILLS=$(KILLS) CHAOS_SEED=$(SEED) $(GO) test -count=1 -v -timeout 90m -run '^TestChaos$$' .

# Runs every fuzz target for FUZZ_TIME.
FUZZ_TIME ?= 30s
fuzz:
	@GO="$(GO)" scripts/fuzz.sh $(FUZZ_TIME)

lint: .tools/golangci-lint-$(GOLANGCI_VERSION)
	@$(GO) version >/dev/null
	PATH="$$(dirname "$(GO)"):$$PATH" $< run --timeout 20m

# On the platform of DATA, which must be running. The proxy is measured beside nginx,
# which is not installed by itself: the package would start a server.
bench: build
	@set -e; for name in $(BENCH); do bin/wrenn bench $$name --data $(DATA); echo; done

.tools/golangci-lint-$(GOLANGCI_VERSION):
	@echo "building golangci-lint $(GOLANGCI_VERSION)"
	@GOBIN=$(CURDIR)/.tools $(GO) install github.com/golangci/golangci-lint/v2/cmd/golangci-lint@$(GOLANGCI_VERSION)
	@mv .tools/golangci-lint $@

generate:
	GOBIN=$(CURDIR)/.tools $(GO) install github.com/bufbuild/buf/cmd/buf@$(BUF_VERSION)
	GOBIN=$(CURDIR)/.tools $(GO) install google.golang.org/protobuf/cmd/protoc-gen-go@$(PROTOC_GEN_GO)
	GOBIN=$(CURDIR)/.tools $(GO) install connectrpc.com/connect/cmd/protoc-gen-connect-go@$(PROTOC_GEN_CONNECT)
	.tools/buf generate

clean:
	rm -rf bin .cache .tools internal/guest/bin/envd internal/runtime/microvm/kernel/bin/guestboot
