package fake

import (
	"encoding/json"
	"fmt"
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
	do         func(*machine, map[string]json.RawMessage) (any, error)
}

type field struct {
	since, until int // minor versions
	needed       bool
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
	"GET /mmds":           {do: func(m *machine, _ map[string]json.RawMessage) (any, error) { return m.mmds, nil }},
	"PUT /boot-source": {when: before, configures: true, do: setBoot,
		fields: map[string]field{"kernel_image_path": must, "initrd_path": may, "boot_args": may}},
	"PUT /drives": {when: before, configures: true, id: "drive_id", do: setDrive,
		fields: map[string]field{"drive_id": must, "path_on_host": may, "is_root_device": must, "is_read_only": may, "cache_type": may, "rate_limiter": may, "io_engine": may, "partuuid": may}},
	"PATCH /drives": {when: after, id: "drive_id", fields: map[string]field{"drive_id": must, "path_on_host": may, "rate_limiter": may}},
	"PUT /network-interfaces": {when: before, configures: true, id: "iface_id", do: setNetwork,
		fields: map[string]field{"iface_id": must, "host_dev_name": must, "guest_mac": may, "mtu": {since: 16}, "rx_rate_limiter": may, "tx_rate_limiter": may}},
	"PATCH /network-interfaces": {when: after, id: "iface_id", fields: map[string]field{"iface_id": must, "rx_rate_limiter": may, "tx_rate_limiter": may}},
	"PUT /machine-config": {when: before, configures: true, do: setMachine,
		fields: map[string]field{"vcpu_count": must, "mem_size_mib": must, "smt": may, "track_dirty_pages": may, "huge_pages": may}},
	"PUT /mmds/config": {when: before, configures: true, do: setMMDS,
		fields: map[string]field{"version": may, "network_interfaces": must, "ipv4_address": may, "imds_compat": {since: 14}}},
	"PUT /mmds": {do: func(m *machine, body map[string]json.RawMessage) (any, error) {
		data, err := json.Marshal(body)
		m.mmds = data
		return nil, err
	}},
	"PUT /entropy": {when: before, configures: true, fields: map[string]field{"rate_limiter": may}},
	"PUT /serial":  {since: 14, when: before, fields: map[string]field{"serial_out_path": may, "rate_limiter": {since: 16}}},
	"PUT /vsock":   {when: before, configures: true, fields: map[string]field{"guest_cid": must, "uds_path": must}},
	"PUT /balloon": {when: before, configures: true, fields: map[string]field{"amount_mib": must, "deflate_on_oom": must,
		"stats_polling_interval_s": may, "free_page_hinting": {since: 14}, "free_page_reporting": {since: 14}}},
	"PATCH /balloon":          {when: after, fields: map[string]field{"amount_mib": must}},
	"GET /balloon/statistics": {when: after, do: func(*machine, map[string]json.RawMessage) (any, error) { return map[string]int{}, nil }},
	"PUT /logger":             {when: before, fields: map[string]field{"log_path": may, "level": may, "show_level": may, "show_log_origin": may, "module": may}},
	"PUT /metrics":            {when: before, fields: map[string]field{"metrics_path": must}},
	"PUT /actions":            {fields: map[string]field{"action_type": must}, do: act},
	"PATCH /vm":               {when: after, fields: map[string]field{"state": must}, do: setState},
	"PUT /snapshot/create": {when: after, do: create,
		fields: map[string]field{"snapshot_type": may, "snapshot_path": must, "mem_file_path": must}},
	"PUT /snapshot/load": {when: before, do: load, fields: map[string]field{
		"snapshot_path": must, "mem_backend": must, "resume_vm": may,
		"mem_file_path":         {since: 1, until: 1}, // deprecated in all versions
		"enable_diff_snapshots": {until: 13}, "track_dirty_pages": {since: 13},
		"network_overrides": may, "vsock_override": {since: 16}, "clock_realtime": {since: 16}}},
}

func getMachine(m *machine, _ map[string]json.RawMessage) (any, error) {
	return map[string]any{"vcpu_count": max(m.config.CPUs, 1), "mem_size_mib": memorySize(m.config) >> 20, "smt": false, "track_dirty_pages": m.config.Track}, nil
}

func setBoot(m *machine, body map[string]json.RawMessage) (any, error) {
	for _, name := range []string{"kernel_image_path", "initrd_path"} {
		if path := text(body, name); path != "" {
			f, err := os.Open(path)
			if err != nil {
				return nil, refusal(fmt.Sprintf("Boot source error: The kernel file cannot be opened: %v", err))
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
	if err := d.open(); err != nil {
		return nil, refusal(fmt.Sprintf("Drive config error: Unable to create the virtio block device: %v", err))
	}
	m.config.Drives = append(slices.DeleteFunc(m.config.Drives, func(o drive) bool { return o.ID == d.ID }), d)
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
	id, tap := text(body, "iface_id"), text(body, "host_dev_name")
	for other, used := range m.config.TAPs {
		if other != id && used == tap {
			return nil, refusal("Network config error: Could not create the network device: Open tap device failed: Resource busy")
		}
	}
	if m.config.TAPs == nil {
		m.config.TAPs = map[string]string{}
	}
	m.config.TAPs[id] = tap
	if err := m.openTAP(tap); err != nil {
		return nil, refusal(fmt.Sprintf("Network config error: Could not create the network device: Open tap device failed: %v", err))
	}
	return nil, nil
}

func setMachine(m *machine, body map[string]json.RawMessage) (any, error) {
	var c struct {
		CPUs   int   `json:"vcpu_count"`
		Memory int64 `json:"mem_size_mib"`
		Track  bool  `json:"track_dirty_pages"`
	}
	data, err := json.Marshal(body)
	if err == nil {
		err = json.Unmarshal(data, &c)
	}
	switch {
	case err != nil:
		return nil, refusal(err.Error())
	case c.CPUs < 1 || c.CPUs > 32:
		return nil, refusal("Machine config error: The vCPU number is invalid! The vCPU number must be between 1 and 32.")
	case c.Memory < 1:
		return nil, refusal("Machine config error: The memory size (MiB) is either 0, or not a multiple of the configured page size.")
	}
	m.config.CPUs, m.config.MemoryMiB, m.config.Track = c.CPUs, c.Memory, c.Track
	return nil, nil
}

func setMMDS(m *machine, body map[string]json.RawMessage) (any, error) {
	var ids []string
	if err := json.Unmarshal(body["network_interfaces"], &ids); err != nil || len(ids) == 0 {
		return nil, refusal("MMDS config error: The list of network interface IDs that allow forwarding MMDS requests is empty.")
	}
	if text(body, "version") != "V2" {
		return nil, refusal("MMDS config error: version 1 is deprecated.")
	}
	for _, id := range ids {
		if _, ok := m.config.TAPs[id]; !ok {
			return nil, refusal("MMDS config error: The list of network interface IDs provided contains at least one ID that does not correspond to any existing network interface.")
		}
	}
	m.config.MMDS = ids
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
	case "FlushMetrics", "SendCtrlAltDel":
		if m.state == notStarted {
			return nil, errBefore
		}
		if action == "SendCtrlAltDel" {
			m.fail()
			m.exit = 0
		}
		return nil, nil
	default:
		return nil, refusal(fmt.Sprintf("An error occurred when deserializing the json body of a request: unknown variant `%s`.", action))
	}
}

func setState(m *machine, body map[string]json.RawMessage) (any, error) {
	switch state := text(body, "state"); {
	case state == "Paused":
		m.state = paused
	case state == "Resumed" && m.state == paused:
		m.run()
	case state != "Resumed":
		return nil, refusal(fmt.Sprintf("An error occurred when deserializing the json body of a request: unknown variant `%s`.", state))
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
