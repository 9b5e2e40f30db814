// Package firecracker drives Firecracker, of any version from 1.12 to 1.16, as the
// monitor of one virtual machine: a client of its API, what each version can do,
// whether it can boot Linux on this host, and a microvm.Monitor made of these.
//
// An image of a machine is Firecracker's file of its devices, and its memory as
// package memory stores it, taken over from the file that Firecracker writes. A
// machine that is loaded gets its memory page by page from the pager, or where there
// is none out of a file.
//
// The monitor is confined by Firecracker's jailer where there is one, else by package
// jail alone.
package firecracker
