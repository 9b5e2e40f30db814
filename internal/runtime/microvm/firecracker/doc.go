// Package firecracker drives Firecracker, of any version from 1.12 to 1.16: a client of
// its API, what each version can do, and whether it can boot Linux on this host.
package firecracker
