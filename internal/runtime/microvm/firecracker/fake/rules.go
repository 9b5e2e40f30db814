package fake

import (
	"encoding/json"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"

	"golang.org/x/sys/unix"
)

// When a call is allowed.
const (
	always = iota
	before // the start
	after
)

// rule is what is known of a call.
type rule struct {
	since      int // minor version
	when       int
	configures bool   // the machine for a boot
	id         string // field that is in the path too
	fields     map[string]field
	anything   bool // is a body
	bodiless   bool // there may be no body
	hotplug    bool // devices of that kind can be added to a running machine with PCI
	do         func(*machine, map[string]json.RawMessage) (any, error)
}

type field struct {
	since, until int // minor versions
	needed       bool
	truth        bool     // or not
	level        bool     // of a logger
	oneOf        []string // is its value
}

var (
	must = field{needed: true}
	may  = field{}
)

var rules = map[string]rule{
	"GET /": {do: func(m *machine, _ map[string]json.RawMessage) (any, error) {
		return map[string]string{"app_name": "Firecracker", "id": m.id, "state": m.state, "vmm_version": m.version}, nil
	}},
	"GET /version": {do: func(m *machine, _ map[string]json.RawMessage) (any, error) {
		return map[string]string{"firecracker_version": m.version}, nil
	}},
	"GET /vm/config":      {do: func(m *machine, _ map[string]json.RawMessage) (any, error) { return m.config, nil }},
	"GET /machine-config": {do: getMachine},
	"GET /mmds":           {do: getMMDS},
	"PUT /boot-source": {when: before, configures: true, do: setBoot,
		fields: map[string]field{"kernel_image_path": must, "initrd_path": may, "boot_args": may}},
	"PUT /drives": {when: before, hotplug: true, configures: true, id: "drive_id", do: setDrive,
		fields: map[string]field{"drive_id": must, "path_on_host": may, "is_root_device": must, "is_read_only": may, "cache_type": may, "rate_limiter": may, "io_engine": may, "partuuid": may, "socket": may}},
	"PATCH /drives": {when: after, id: "drive_id", do: updateDrive, fields: map[string]field{"drive_id": must, "path_on_host": may, "rate_limiter": may}},
	"PUT /network-interfaces": {when: before, hotplug: true, configures: true, id: "iface_id", do: setNetwork,
		fields: map[string]field{"iface_id": must, "host_dev_name": must, "guest_mac": may, "mtu": {since: 16}, "rx_rate_limiter": may, "tx_rate_limiter": may}},
	"PATCH /network-interfaces": {when: after, id: "iface_id", do: updateNetwork, fields: map[string]field{"iface_id": must, "rx_rate_limiter": may, "tx_rate_limiter": may}},
	"PUT /machine-config": {when: before, configures: true, do: setMachine,
		fields: map[string]field{"vcpu_count": must, "mem_size_mib": must, "smt": may, "cpu_template": may, "track_dirty_pages": may, "huge_pages": {oneOf: []string{"None", "2M"}}}},
	"PUT /cpu-config": {when: before, configures: true, do: setCPU,
		fields: map[string]field{"kvm_capabilities": may, "cpuid_modifiers": may, "msr_modifiers": may}},
	"PUT /mmds/config": {when: before, configures: true, do: setMMDS,
		fields: map[string]field{"version": {oneOf: []string{"V1", "V2"}}, "network_interfaces": must, "ipv4_address": may, "imds_compat": {since: 14}}},
	"PUT /mmds":    {anything: true, do: putMMDS},
	"PUT /entropy": {when: before, configures: true, fields: map[string]field{"rate_limiter": may}},
	"PUT /serial":  {since: 14, when: before, fields: map[string]field{"serial_out_path": may, "rate_limiter": {since: 16}}},
	"PUT /vsock":   {when: before, configures: true, fields: map[string]field{"guest_cid": must, "uds_path": must}},
	"PUT /balloon": {when: before, configures: true, do: setBalloon, fields: map[string]field{"amount_mib": must, "deflate_on_oom": must,
		"stats_polling_interval_s": may, "free_page_hinting": {since: 14}, "free_page_reporting": {since: 14}}},
	"PATCH /balloon":               {when: after, fields: map[string]field{"amount_mib": must}, do: updateBalloon},
	"GET /balloon/statistics":      {when: after, do: balloonStats},
	"PATCH /balloon/hinting/start": {since: 14, when: after, bodiless: true, fields: map[string]field{"acknowledge_on_stop": {truth: true}}, do: startHinting},
	"PATCH /balloon/hinting/stop":  {since: 14, when: after, bodiless: true, do: stopHinting},
	"GET /balloon/hinting/status":  {since: 14, when: after, do: hintingStatus},
	"PUT /logger":                  {when: before, fields: map[string]field{"log_path": may, "level": {level: true}, "show_level": may, "show_log_origin": may, "module": may}},
	"PUT /metrics":                 {when: before, fields: map[string]field{"metrics_path": must}, do: setMetrics},
	"PUT /actions":                 {fields: map[string]field{"action_type": {needed: true, oneOf: []string{"FlushMetrics", "InstanceStart", "SendCtrlAltDel"}}}, do: act},
	"PATCH /vm":                    {when: after, fields: map[string]field{"state": {needed: true, oneOf: []string{"Paused", "Resumed"}}}, do: setState},
	"PUT /snapshot/create": {when: after, do: create,
		fields: map[string]field{"snapshot_type": {oneOf: []string{"Full", "Diff"}}, "snapshot_path": must, "mem_file_path": must}},
	"PUT /snapshot/load": {when: before, do: load, fields: map[string]field{
		"snapshot_path": must, "mem_backend": must, "resume_vm": may,
		"mem_file_path":         {since: 1, until: 1}, // deprecated in all versions
		"enable_diff_snapshots": {until: 13}, "track_dirty_pages": {since: 13},
		"network_overrides": may, "vsock_override": {since: 16}, "clock_realtime": {since: 16}}},
}

func getMachine(m *machine, _ map[string]json.RawMessage) (any, error) {
	return map[string]any{"vcpu_count": max(m.config.CPUs, 1), "mem_size_mib": memorySize(m.config) >> 20, "smt": false, "track_dirty_pages": m.config.Track, "huge_pages": "None"}, nil
}

func setBoot(m *machine, body map[string]json.RawMessage) (any, error) {
	for _, part := range [][2]string{
		{"kernel_image_path", "Boot source error: The kernel file cannot be opened: "},
		{"initrd_path", "Boot source error: The initrd file cannot be opened due to invalid path or invalid permissions. "},
	} {
		if path := text(body, part[0]); path != "" {
			f, err := os.Open(path)
			if err != nil {
				return nil, refusal(part[1] + system(err))
			}
			f.Close()
		}
	}
	m.kernel = true
	return nil, nil
}

func setDrive(m *machine, body map[string]json.RawMessage) (any, error) {
	d := drive{ID: text(body, "drive_id"), Path: text(body, "path_on_host")}
	_ = json.Unmarshal(body["is_read_only"], &d.ReadOnly) // missing: no
	_ = json.Unmarshal(body["is_root_device"], &d.Root)   // is there
	for _, other := range m.config.Drives {
		if d.Root && other.Root && other.ID != d.ID {
			return nil, refusal("Drive config error: A root block device already exists!")
		}
	}
	if d.Path == "" {
		return nil, refusal("Drive config error: Unable to create the virtio block device: Invalid block config.")
	}
	if err := d.open(); err != nil {
		return nil, refusal(fmt.Sprintf("Drive config error: Unable to create the virtio block device: Virtio backend error: Error manipulating the backing file: %s %s", system(err), d.Path))
	}
	m.config.Drives = append(slices.DeleteFunc(m.config.Drives, func(o drive) bool { return o.ID == d.ID }), d)
	return nil, nil
}

const errNoDevice = "Failed perform action on device: Device not found"

func updateDrive(m *machine, body map[string]json.RawMessage) (any, error) {
	i := slices.IndexFunc(m.config.Drives, func(d drive) bool { return d.ID == text(body, "drive_id") })
	switch {
	case i < 0:
		return nil, refusal("Drive config error: Unable to patch the block device: " + errNoDevice + " Please verify the request arguments.")
	case body["path_on_host"] == nil && body["rate_limiter"] == nil:
		return nil, refusal("Drive config error: Unable to patch the block device: Block: Running method expected different backend. Please verify the request arguments.")
	}
	return nil, nil
}

func (d drive) open() error {
	mode := os.O_RDWR
	if d.ReadOnly {
		mode = os.O_RDONLY
	}
	f, err := os.OpenFile(d.Path, mode, 0)
	if err == nil {
		f.Close()
	}
	return err
}

func setNetwork(m *machine, body map[string]json.RawMessage) (any, error) {
	id, tap, mac := text(body, "iface_id"), text(body, "host_dev_name"), text(body, "guest_mac")
	if _, err := net.ParseMAC(mac); mac != "" && err != nil {
		return nil, unreadable("The provided MAC address is invalid")
	}
	for other, used := range m.config.MACs {
		if other != id && mac != "" && used == mac {
			return nil, refusal("Network config error: The MAC address is already in use: " + mac)
		}
	}
	const failed = "Network config error: Could not create the network device: Open tap device failed: Error while creating ifreq structure: %s. " +
		"Invalid TUN/TAP Backend provided by %s. Check our documentation on setting up the network devices."
	for other, used := range m.config.TAPs {
		if other != id && used == tap {
			return nil, refusal(fmt.Sprintf(failed, system(unix.EBUSY), tap))
		}
	}
	if err := m.openTAP(tap); err != nil {
		return nil, refusal(fmt.Sprintf(failed, system(err), tap))
	}
	if m.config.TAPs == nil {
		m.config.TAPs, m.config.MACs = map[string]string{}, map[string]string{}
	}
	m.config.TAPs[id], m.config.MACs[id] = tap, mac
	return nil, nil
}

func updateNetwork(m *machine, body map[string]json.RawMessage) (any, error) {
	if _, ok := m.config.TAPs[text(body, "iface_id")]; !ok {
		return nil, refusal("Network config error: Unable to update the net device: " + errNoDevice)
	}
	return nil, nil
}

func setMachine(m *machine, body map[string]json.RawMessage) (any, error) {
	var c struct {
		CPUs   int    `json:"vcpu_count"`
		Memory int64  `json:"mem_size_mib"`
		SMT    bool   `json:"smt"`
		Track  bool   `json:"track_dirty_pages"`
		Pages  string `json:"huge_pages"`
	}
	data, err := json.Marshal(body)
	if err == nil {
		err = json.Unmarshal(data, &c)
	}
	switch {
	case err != nil:
		return nil, unreadable(err.Error())
	case c.CPUs < 1 || c.CPUs > 32 || c.SMT && c.CPUs > 1 && c.CPUs%2 == 1:
		return nil, refusal("Machine config error: The number of vCPUs must be greater than 0, less than 32 and must be 1 or an even number if SMT is enabled.")
	case c.Memory < 1 || c.Pages == "2M" && c.Memory%2 == 1:
		return nil, refusal("Machine config error: The memory size (MiB) is either 0, or not a multiple of the configured page size.")
	case m.balloon != nil && m.balloon.Amount > c.Memory:
		return nil, refusal("Machine config error: The memory size (MiB) is smaller than the previously set balloon device target size.")
	}
	m.config.CPUs, m.config.MemoryMiB, m.config.Track = c.CPUs, c.Memory, c.Track
	return nil, nil
}

// setCPU checks the parts of a template as far as they are checked before the start.
func setCPU(_ *machine, body map[string]json.RawMessage) (any, error) {
	var c struct {
		Leaves []struct {
			Leaf      *string `json:"leaf"`
			Subleaf   *string `json:"subleaf"`
			Flags     *int    `json:"flags"`
			Modifiers []struct {
				Register string `json:"register"`
				Bitmap   string `json:"bitmap"`
			} `json:"modifiers"`
		} `json:"cpuid_modifiers"`
		MSRs []struct {
			Addr   *string `json:"addr"`
			Bitmap *string `json:"bitmap"`
		} `json:"msr_modifiers"`
	}
	data, err := json.Marshal(body)
	if err == nil {
		err = json.Unmarshal(data, &c)
	}
	if err != nil {
		return nil, unreadable(err.Error())
	}
	for _, l := range c.Leaves {
		if l.Leaf == nil || l.Subleaf == nil || l.Flags == nil {
			return nil, unreadable("missing field `leaf`")
		}
	}
	for _, r := range c.MSRs {
		if r.Addr == nil || r.Bitmap == nil {
			return nil, unreadable("missing field `addr`")
		}
	}
	return nil, nil
}

func setMMDS(m *machine, body map[string]json.RawMessage) (any, error) {
	var ids []string
	if err := json.Unmarshal(body["network_interfaces"], &ids); err != nil || len(ids) == 0 {
		return nil, refusal("MMMDS config error: The list of network interface IDs that allow forwarding MMDS requests is empty.") // three Ms, as it says
	}
	for _, id := range ids {
		if _, ok := m.config.TAPs[id]; !ok {
			return nil, refusal("MMMDS config error: The list of network interface IDs provided contains at least one ID that does not correspond to any existing network interface.")
		}
	}
	if at := text(body, "ipv4_address"); at != "" {
		if addr, err := netip.ParseAddr(at); err != nil || !addr.IsLinkLocalUnicast() {
			return nil, refusal("MMMDS config error: The MMDS IPv4 address is not link local.")
		}
	}
	if text(body, "version") != "V2" {
		return nil, refusal("MMMDS config error: version 1 is deprecated.") // the original only says so in its log
	}
	m.config.MMDS, m.hasMMDS = ids, true
	return nil, nil
}

const errNoMMDS = refusal("MMDS error: The MMDS data store is not initialized.")

// openMMDS makes the store before the start, where it is missing, and not afterwards.
func (m *machine) openMMDS() error {
	if m.state != notStarted && !m.hasMMDS {
		return errNoMMDS
	}
	m.hasMMDS = true
	return nil
}

func getMMDS(m *machine, _ map[string]json.RawMessage) (any, error) {
	if err := m.openMMDS(); err != nil {
		return nil, err
	}
	if m.mmds == nil {
		return struct{}{}, nil
	}
	return m.mmds, nil
}

func putMMDS(m *machine, body map[string]json.RawMessage) (any, error) {
	if err := m.openMMDS(); err != nil {
		return nil, err
	}
	m.mmds = body[""]
	return nil, nil
}

func setMetrics(m *machine, _ map[string]json.RawMessage) (any, error) {
	if m.metrics {
		return nil, refusal("Metrics error: Cannot initialize the metrics system due to bad user input: Reinitialization of metrics not allowed.")
	}
	m.metrics = true
	return nil, nil
}

func act(m *machine, body map[string]json.RawMessage) (any, error) {
	switch action := text(body, "action_type"); action {
	case "InstanceStart":
		if m.state != notStarted {
			return nil, errAfter
		}
		if !m.kernel {
			return nil, refusal("Start microvm error: Cannot start microvm without kernel configuration.")
		}
		var err error
		if m.memory, err = newMemory(memorySize(m.config)); err != nil {
			return nil, refusal(fmt.Sprintf("Start microvm error: %v", err))
		}
		m.run()
		return nil, nil
	default: // FlushMetrics, SendCtrlAltDel
		if m.state == notStarted {
			return nil, errBefore
		}
		if action == "SendCtrlAltDel" {
			m.fail()
			m.exit = 0
		}
		return nil, nil
	}
}

func setState(m *machine, body map[string]json.RawMessage) (any, error) {
	if text(body, "state") == "Paused" {
		m.state = paused
	} else if m.state == paused {
		m.run()
	}
	return nil, nil
}

// openTAP attaches to a link, if this is a machine in a jail: elsewhere there is none.
func (m *machine) openTAP(name string) error {
	if os.Getuid() == 0 {
		return nil
	}
	fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	req, err := unix.NewIfreq(name)
	if err != nil {
		return err
	}
	req.SetUint16(unix.IFF_TAP | unix.IFF_NO_PI | unix.IFF_VNET_HDR)
	m.tap = fd // open as long as the machine
	return unix.IoctlIfreq(fd, unix.TUNSETIFF, req)
}

// run lets the guest go on.
func (m *machine) run() {
	m.state = running
	fmt.Printf("guest counts %d\n", m.memory.count())
}
