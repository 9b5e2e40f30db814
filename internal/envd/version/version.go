// Package version holds the version that the guest agent reports.
package version

// Version is the E2B envd version whose behaviour the agent offers. Clients
// switch features on and off by it.
const Version = "0.6.13"
