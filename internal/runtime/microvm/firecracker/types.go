package firecracker

import "fmt"

// BootSource is the kernel that a machine boots.
type BootSource struct {
	Kernel string `json:"kernel_image_path"`
	Initrd string `json:"initrd_path,omitempty"`
	Args   string `json:"boot_args,omitempty"`
}

// Drive is a disk.
type Drive struct {
	ID        string       `json:"drive_id"`
	Path      string       `json:"path_on_host"`
	Root      bool         `json:"is_root_device"`
	ReadOnly  bool         `json:"is_read_only"`
	CacheType string       `json:"cache_type,omitempty"` // "Unsafe", "Writeback"
	Limiter   *RateLimiter `json:"rate_limiter,omitempty"`
}

// DriveUpdate changes a disk of a running machine.
type DriveUpdate struct {
	ID      string       `json:"drive_id"`
	Path    string       `json:"path_on_host,omitempty"`
	Limiter *RateLimiter `json:"rate_limiter,omitempty"`
}

// NetworkInterface is a link of a machine, on a TAP of the host.
type NetworkInterface struct {
	ID  string       `json:"iface_id"`
	TAP string       `json:"host_dev_name"`
	MAC string       `json:"guest_mac,omitempty"`
	RX  *RateLimiter `json:"rx_rate_limiter,omitempty"`
	TX  *RateLimiter `json:"tx_rate_limiter,omitempty"` // of what the guest sends
}

// NetworkInterfaceUpdate changes the limits of a running machine's link.
type NetworkInterfaceUpdate struct {
	ID string       `json:"iface_id"`
	RX *RateLimiter `json:"rx_rate_limiter,omitempty"`
	TX *RateLimiter `json:"tx_rate_limiter,omitempty"`
}

// RateLimiter bounds bytes and operations.
type RateLimiter struct {
	Bandwidth *TokenBucket `json:"bandwidth,omitempty"`
	Ops       *TokenBucket `json:"ops,omitempty"`
}

// TokenBucket holds Size tokens, is full again after Refill milliseconds, and has
// Burst more that do not come again.
type TokenBucket struct {
	Size   int64 `json:"size"`
	Burst  int64 `json:"one_time_burst,omitempty"`
	Refill int64 `json:"refill_time"`
}

// MachineConfig is the size of a machine.
type MachineConfig struct {
	CPUs       int    `json:"vcpu_count"`
	MemoryMiB  int64  `json:"mem_size_mib"`
	SMT        bool   `json:"smt"`
	TrackDirty bool   `json:"track_dirty_pages,omitempty"`
	HugePages  string `json:"huge_pages,omitempty"` // "None", "2M"
}

// MMDSConfig says how the guest reaches its metadata.
type MMDSConfig struct {
	Version    string   `json:"version"` // "V2": with a token
	Interfaces []string `json:"network_interfaces"`
	Address    string   `json:"ipv4_address,omitempty"`
}

// Entropy is the device that gives the guest random bytes.
type Entropy struct {
	Limiter *RateLimiter `json:"rate_limiter,omitempty"`
}

// Serial says where the serial port writes to.
type Serial struct {
	Path string `json:"serial_out_path,omitempty"`
}

// Vsock is a device for connections between guest and host.
type Vsock struct {
	GuestCID uint32 `json:"guest_cid"`
	Path     string `json:"uds_path"`
}

// Balloon is the device that takes memory back from the guest.
type Balloon struct {
	AmountMiB    int64 `json:"amount_mib"`
	DeflateOnOOM bool  `json:"deflate_on_oom"`
	StatsSeconds int   `json:"stats_polling_interval_s,omitempty"`
	Hinting      bool  `json:"free_page_hinting,omitempty"`   // where Capabilities has BalloonHinting
	Reporting    bool  `json:"free_page_reporting,omitempty"` // likewise
}

// BalloonUpdate changes how much the balloon takes.
type BalloonUpdate struct {
	AmountMiB int64 `json:"amount_mib"`
}

// BalloonStats is what the guest says of its memory, in bytes where not named.
type BalloonStats struct {
	TargetMiB int64 `json:"target_mib"`
	ActualMiB int64 `json:"actual_mib"`
	Free      int64 `json:"free_memory"`
	Total     int64 `json:"total_memory"`
	Available int64 `json:"available_memory"`
	Caches    int64 `json:"disk_caches"`
}

// HintingStatus is how far the guest is in telling which of its pages are free.
type HintingStatus struct {
	Host  uint32  `json:"host_cmd"`  // HintingStop, HintingDone, or the number of a run
	Guest *uint32 `json:"guest_cmd"` // what the guest has said last; nil: nothing yet
}

// What Host and Guest of a HintingStatus can be besides the number of a run.
const (
	HintingStop = 0 // the guest has told all, or nobody has asked
	HintingDone = 1 // the guest may have its pages again
)

// CPUConfig changes what processors a machine has: the same on hosts that differ.
type CPUConfig struct {
	Capabilities []string    `json:"kvm_capabilities,omitempty"` // of KVM, by number, that must be there; with ! not asked for
	CPUID        []CPUIDLeaf `json:"cpuid_modifiers,omitempty"`
	MSRs         []MSR       `json:"msr_modifiers,omitempty"`
}

// CPUIDLeaf changes what the instruction CPUID tells.
type CPUIDLeaf struct {
	Leaf      Hex             `json:"leaf"`
	Subleaf   Hex             `json:"subleaf"`
	Flags     int             `json:"flags"` // of KVM: 1 where the subleaf matters
	Registers []CPUIDRegister `json:"modifiers"`
}

// CPUIDRegister changes one register of a leaf.
type CPUIDRegister struct {
	Register string `json:"register"` // "eax", "ebx", "ecx", "edx"
	Bits     Bits   `json:"bitmap"`
}

// MSR changes a register that is specific to the model.
type MSR struct {
	Address Hex  `json:"addr"`
	Bits    Bits `json:"bitmap"`
}

// Bits are what becomes of a register's lower bits: "0b" and then 0, 1, or x for one
// that stays, the highest first.
type Bits string

// Hex is a number that Firecracker reads in words.
type Hex uint32

// MarshalText implements encoding.TextMarshaler.
func (h Hex) MarshalText() ([]byte, error) { return fmt.Appendf(nil, "%#x", uint32(h)), nil }

// Logger says where Firecracker's own words go.
type Logger struct {
	Path  string `json:"log_path,omitempty"`
	Level string `json:"level,omitempty"`
}

// Metrics says where Firecracker's counters go.
type Metrics struct {
	Path string `json:"metrics_path"`
}

// Kinds of a snapshot.
const (
	Full = "Full"
	Diff = "Diff" // what was written since the machine was loaded or the last snapshot
)

// SnapshotCreate says where a snapshot is written.
type SnapshotCreate struct {
	Kind   string `json:"snapshot_type"`
	State  string `json:"snapshot_path"`
	Memory string `json:"mem_file_path"`
}

// Kinds of a MemoryBackend.
const (
	File = "File"
	Uffd = "Uffd"
)

// MemoryBackend is where the memory of a loaded machine comes from.
type MemoryBackend struct {
	Kind string `json:"backend_type"`
	Path string `json:"backend_path"` // of the file, or of the socket that a pager listens at
}

// NetworkOverride gives a link of a snapshot another TAP.
type NetworkOverride struct {
	ID  string `json:"iface_id"`
	TAP string `json:"host_dev_name"`
}

// VsockOverride gives the vsock device of a snapshot another socket.
type VsockOverride struct {
	Path string `json:"uds_path"`
}

// SnapshotLoad says what is loaded. Client.Load puts it into the words of the
// version, and refuses what that cannot do.
type SnapshotLoad struct {
	State         string
	Memory        MemoryBackend
	TrackDirty    bool // so that the next Diff has just what was written
	Resume        bool
	Networks      []NetworkOverride
	Vsock         *VsockOverride
	ClockRealtime bool
}

// States of an Instance.
const (
	NotStarted = "Not started"
	Running    = "Running"
	Paused     = "Paused"
)

// Instance is what Firecracker says of itself.
type Instance struct {
	App     string `json:"app_name"`
	ID      string `json:"id"`
	State   string `json:"state"`
	Version string `json:"vmm_version"`
}
