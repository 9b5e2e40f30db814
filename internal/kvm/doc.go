// Package kvm runs guests of a few instructions through /dev/kvm alone: to see whether
// KVM works, and what it does with memory whose pages another process brings in.
package kvm
