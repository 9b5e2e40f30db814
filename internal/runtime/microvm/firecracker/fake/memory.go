package fake

import (
	"cmp"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"slices"
	"unsafe"

	"golang.org/x/sys/unix"
)

const page = 4096

// memory is that of the machine, mapped as Firecracker maps it.
type memory struct {
	bytes    []byte
	tracked  bool
	written  map[int]bool // pages, since the last snapshot or load
	resident map[int]bool
	uffd     int // kept as long as the machine, and not blocking
	pager    net.Conn
}

func newMemory(size int64) (*memory, error) {
	b, err := unix.Mmap(-1, 0, int(size), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_NORESERVE)
	if err != nil {
		return nil, fmt.Errorf("map memory: %w", err)
	}
	return &memory{bytes: b, written: map[int]bool{}, resident: map[int]bool{}}, nil
}

// Counter is the page that the guest counts in, and First the one that it fills when
// it has counted to 1.
const (
	Counter = 1
	First   = 2
)

// count is what the guest does: it counts on, looks whether the page that it filled at
// half the number has what it filled it with, and fills another page with the number.
func (m *memory) count() uint64 {
	at := m.bytes[Counter*page:]
	n := binary.LittleEndian.Uint64(at) + 1
	binary.LittleEndian.PutUint64(at, n)
	if half := n / 2; half > 0 {
		back := First + (int(half)-1)%(len(m.bytes)/page-First)
		if got := m.bytes[back*page+page-1]; got != byte(half) {
			panic(fmt.Sprintf("page %d holds %d where %d was written", back, got, byte(half)))
		}
		m.resident[back] = true
	}
	fill := First + (int(n)-1)%(len(m.bytes)/page-First)
	for i := range page {
		m.bytes[fill*page+i] = byte(n)
	}
	for _, p := range []int{Counter, fill} {
		m.written[p], m.resident[p] = true, true
	}
	return n
}

// saved is the file with the state of a machine.
type saved struct {
	Format int    `json:"format"`
	Config config `json:"config"`
	Magic  string `json:"magic"`
}

const magic = "fake firecracker"

// format is the version of snapshots by that of the program.
func (m *machine) format() int {
	switch {
	case m.minor <= 12:
		return 6
	case m.minor <= 14:
		return 8
	}
	return m.minor - 6
}

func create(m *machine, body map[string]json.RawMessage) (any, error) {
	kind := text(body, "snapshot_type")
	if m.state != paused {
		return nil, refusal("Create snapshot error: Cannot save the microVM state: Operation not allowed: save/restore unavailable while running")
	}
	if kind == "Diff" && !m.memory.tracked && m.minor < 13 {
		return nil, refusal("The requested operation is not supported: Diff snapshots are not allowed on uVMs with dirty page tracking disabled.")
	}
	data, err := json.Marshal(saved{Format: m.format(), Config: m.config, Magic: magic})
	if err != nil {
		return nil, err
	}
	if err := os.WriteFile(text(body, "snapshot_path"), data, 0o600); err != nil {
		return nil, refusal("Create snapshot error: Cannot perform open on the snapshot backing file: " + system(err))
	}
	if err := m.memory.write(text(body, "mem_file_path"), kind == "Diff"); err != nil {
		return nil, refusal("Create snapshot error: Cannot perform open on the memory backing file: " + system(err))
	}
	m.memory.written = map[int]bool{}
	return nil, nil
}

func (m *memory) write(path string, diff bool) error {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := f.Truncate(int64(len(m.bytes))); err != nil {
		return err
	}
	if !diff {
		_, err := f.WriteAt(m.bytes, 0)
		return err
	}
	pages := m.resident // without tracking: all that is there may have been written
	if m.tracked {
		pages = m.written
	}
	for p := range pages {
		if _, err := f.WriteAt(m.bytes[p*page:][:page], int64(p)*page); err != nil {
			return err
		}
	}
	return nil
}

func load(m *machine, body map[string]json.RawMessage) (any, error) {
	if m.configured {
		return nil, refusal("Load snapshot error: Loading a microVM snapshot not allowed after configuring boot-specific resources.")
	}
	if err := m.restore(body); err != nil {
		m.fail() // as the original: what was begun cannot be taken back
		return nil, refusal(fmt.Sprintf("Load snapshot error: Failed to restore from snapshot: %v", err))
	}
	m.state = paused
	var resume bool
	if _ = json.Unmarshal(body["resume_vm"], &resume); resume { // missing: no
		m.run()
	}
	return nil, nil
}

func (m *machine) restore(body map[string]json.RawMessage) error {
	data, err := os.ReadFile(text(body, "snapshot_path"))
	if err != nil {
		return refusal("Failed to get snapshot state from file: Failed to open snapshot file: " + system(err))
	}
	var s saved
	if err := json.Unmarshal(data, &s); err != nil || s.Magic != magic {
		return refusal("Failed to get snapshot state from file: Failed to load snapshot state from file: An error occurred during bitcode serialization: bitcode error")
	}
	if s.Format != m.format() {
		return fmt.Errorf("invalid format version: %d.0.0", s.Format)
	}
	var overrides []struct {
		ID  string `json:"iface_id"`
		TAP string `json:"host_dev_name"`
	}
	if raw, ok := body["network_overrides"]; ok {
		if err := json.Unmarshal(raw, &overrides); err != nil {
			return err
		}
	}
	for _, o := range overrides {
		if _, ok := s.Config.TAPs[o.ID]; !ok {
			return refusal("Failed to get snapshot state from file: Unknown Network Device.")
		}
		s.Config.TAPs[o.ID] = o.TAP
	}
	for _, tap := range s.Config.TAPs {
		if err := m.openTAP(tap); err != nil {
			return err
		}
	}
	for _, d := range s.Config.Drives {
		if err := d.open(); err != nil {
			return err
		}
	}
	var backend struct {
		Kind string `json:"backend_type"`
		Path string `json:"backend_path"`
	}
	if err := json.Unmarshal(body["mem_backend"], &backend); err != nil {
		return err
	}
	size := memorySize(s.Config)
	if backend.Kind == "Uffd" {
		if m.memory, err = memoryFromPager(backend.Path, size, m.minor >= 12); err != nil {
			return refusal("Failed to load guest memory: Error creating guest memory from uffd: Failed to connect to UDS Unix stream: " + system(err))
		}
	} else if m.memory, err = memoryFromFile(backend.Path, size); err != nil {
		return refusal("Failed to load guest memory: Error creating guest memory from file: Failed to load guest memory: " + system(err))
	}
	for _, name := range []string{"enable_diff_snapshots", "track_dirty_pages"} {
		var on bool
		_ = json.Unmarshal(body[name], &on) // missing: no
		m.memory.tracked = m.memory.tracked || on
	}
	s.Config.Track = m.memory.tracked
	m.config = s.Config
	m.hasMMDS = m.hasMMDS || len(m.config.MMDS) > 0
	return nil
}

func memoryFromFile(path string, size int64) (*memory, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if info.Size() != size {
		return nil, fmt.Errorf("the memory file has %d bytes, want %d", info.Size(), size)
	}
	b, err := unix.Mmap(int(f.Fd()), 0, int(size), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE)
	if err != nil {
		return nil, fmt.Errorf("map memory: %w", err)
	}
	return &memory{bytes: b, written: map[int]bool{}, resident: map[int]bool{}}, nil
}

// memoryFromPager maps memory whose faults another process serves, and tells that
// process where it is.
func memoryFromPager(socket string, size int64, pageSize bool) (*memory, error) {
	m, err := newMemory(size)
	if err != nil {
		return nil, err
	}
	start := uint64(uintptr(unsafe.Pointer(&m.bytes[0])))
	if m.uffd, err = register(start, uint64(size)); err != nil {
		return nil, err
	}
	region := map[string]uint64{"base_host_virt_addr": start, "size": uint64(size), "offset": 0, "page_size_kib": page}
	if pageSize {
		region["page_size"] = page
	}
	message, err := json.Marshal([]map[string]uint64{region})
	if err != nil {
		return nil, err
	}
	conn, err := net.DialUnix("unix", nil, &net.UnixAddr{Net: "unix", Name: socket})
	if err != nil {
		return nil, err
	}
	m.pager = conn
	_, _, err = conn.WriteMsgUnix(message, unix.UnixRights(m.uffd), nil)
	return m, err
}

// Numbers of linux/userfaultfd.h.
const (
	uffdNew      = 0xaa00
	uffdAPI      = 0xc018aa3f
	uffdRegister = 0xc020aa00
	uffdMissing  = 1
	uffdRemove   = 1 << 3 // feature: events of memory that was given back
)

func register(start, size uint64) (int, error) {
	fd, _, errno := unix.Syscall(unix.SYS_USERFAULTFD, unix.O_CLOEXEC|unix.O_NONBLOCK, 0, 0)
	if dev, err := os.Open("/dev/userfaultfd"); err == nil {
		if errno == 0 {
			unix.Close(int(fd))
		}
		fd, _, errno = unix.Syscall(unix.SYS_IOCTL, dev.Fd(), uffdNew, unix.O_CLOEXEC|unix.O_NONBLOCK)
		dev.Close()
	}
	if errno != 0 {
		return 0, fmt.Errorf("make userfaultfd: %w", errno)
	}
	api := [3]uint64{0xaa, uffdRemove, 0}
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, fd, uffdAPI, uintptr(unsafe.Pointer(&api))); errno != 0 {
		return 0, fmt.Errorf("set up userfaultfd: %w", errno)
	}
	reg := [4]uint64{start, size, uffdMissing, 0}
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, fd, uffdRegister, uintptr(unsafe.Pointer(&reg))); errno != 0 {
		return 0, fmt.Errorf("register memory: %w", errno)
	}
	return int(fd), nil
}

// Pages gives what a memory file holds of pages that are not zero, in order.
func Pages(path string) ([]int, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	var pages []int
	for p := range len(data) / page {
		if slices.ContainsFunc(data[p*page:][:page], func(b byte) bool { return b != 0 }) {
			pages = append(pages, p)
		}
	}
	return pages, nil
}

// memorySize is that of a machine, which has 128 MiB unless something else was said.
func memorySize(c config) int64 { return cmp.Or(c.MemoryMiB, 128) << 20 }
