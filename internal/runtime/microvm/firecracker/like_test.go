package firecracker_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/wrenn/wrenn/internal/runtime/microvm/firecracker"
	"github.com/wrenn/wrenn/internal/runtime/microvm/firecracker/fake"
)

// A scenario is calls of one Firecracker, one after the other: method, path, body. In
// bodies, DIR is a directory of the run, SAVED one with a snapshot, and KERNEL the guest.
// The guest of the fake has a driver for the balloon, and the one of a few instructions
// has none: so calls that begin with ? are refused by the real one.
type scenario struct {
	name  string
	calls []string
}

const (
	setKernel  = `PUT /boot-source {"kernel_image_path":"KERNEL","boot_args":"quiet"}`
	setMemory  = `PUT /machine-config {"vcpu_count":1,"mem_size_mib":4}`
	setRoot    = `PUT /drives/root {"drive_id":"root","path_on_host":"DIR/disk","is_root_device":false,"is_read_only":false}`
	setNetwork = `PUT /network-interfaces/eth0 {"iface_id":"eth0","host_dev_name":"tap0","guest_mac":"02:fc:00:00:00:15"}`
	setMMDS    = `PUT /mmds/config {"version":"V2","network_interfaces":["eth0"]}`
	setBalloon = `PUT /balloon {"amount_mib":0,"deflate_on_oom":true,"stats_polling_interval_s":1,"free_page_hinting":true,"free_page_reporting":true}`
	boot       = `PUT /actions {"action_type":"InstanceStart"}`
	pause      = `PATCH /vm {"state":"Paused"}`
	resume     = `PATCH /vm {"state":"Resumed"}`
	full       = `PUT /snapshot/create {"snapshot_type":"Full","snapshot_path":"DIR/state","mem_file_path":"DIR/memory"}`
	diff       = `PUT /snapshot/create {"snapshot_type":"Diff","snapshot_path":"DIR/state2","mem_file_path":"DIR/memory2"}`
	fromFile   = `"mem_backend":{"backend_type":"File","backend_path":"DIR/memory"}`
)

var scenarios = []scenario{
	{"before the start", []string{
		`GET /`, `GET /version`, `GET /machine-config`, `GET /mmds`, `GET /balloon/statistics`, `GET /nothing`, `GET /snapshot`, `DELETE /vm`,
		boot, pause, resume, full, diff,
		`PATCH /drives/root {"drive_id":"root"}`, `PATCH /network-interfaces/eth0 {"iface_id":"eth0"}`, `PATCH /balloon {"amount_mib":1}`,
		`PUT /actions {"action_type":"FlushMetrics"}`, `PUT /actions {"action_type":"SendCtrlAltDel"}`, `PUT /actions {"action_type":"Dance"}`, `PUT /actions {}`,
		`PATCH /balloon/hinting/start`, `PATCH /balloon/hinting/stop`, `GET /balloon/hinting/status`,
		`PUT /machine-config`, `PUT /machine-config {`, `PATCH /vm {"state":"Asleep"}`, `PATCH /vm {"state":"Paused","more":1}`,
	}},
	{"what is set is checked", []string{
		`PUT /boot-source {"kernel_image_path":"DIR/missing"}`, `PUT /boot-source {}`, `PUT /boot-source {"kernel_image_path":"KERNEL","initrd_path":"DIR/missing"}`,
		`PUT /boot-source {"kernel_image_path":"KERNEL","more":1}`,
		`PUT /drives/root {"drive_id":"root","path_on_host":"DIR/missing","is_root_device":false}`,
		`PUT /drives/root {"drive_id":"other","path_on_host":"DIR/disk","is_root_device":false}`,
		`PUT /drives/root {"drive_id":"root","path_on_host":"DIR/disk"}`,
		`PUT /drives/root {"drive_id":"root","is_root_device":true}`,
		`PUT /drives/root {"drive_id":"root","path_on_host":"DIR/disk","is_root_device":true,"is_read_only":false}`,
		`PUT /drives/two {"drive_id":"two","path_on_host":"DIR/disk","is_root_device":true,"is_read_only":true}`,
		`PUT /drives/a-b {"drive_id":"a-b","path_on_host":"DIR/disk","is_root_device":false}`,
		`PUT /machine-config {"vcpu_count":0,"mem_size_mib":4}`, `PUT /machine-config {"vcpu_count":33,"mem_size_mib":4}`,
		`PUT /machine-config {"vcpu_count":1,"mem_size_mib":0}`, `PUT /machine-config {"vcpu_count":1}`, `PUT /machine-config {"vcpu_count":1,"mem_size_mib":4,"more":1}`,
		`PUT /machine-config {"vcpu_count":3,"mem_size_mib":4,"smt":true}`, `PUT /machine-config {"vcpu_count":1,"mem_size_mib":5,"huge_pages":"2M"}`,
		`PUT /network-interfaces/eth0 {"iface_id":"eth1","host_dev_name":"tap0"}`, setNetwork, setNetwork,
		`PUT /network-interfaces/eth1 {"iface_id":"eth1","host_dev_name":"tap0"}`,
		`PUT /network-interfaces/eth1 {"iface_id":"eth1","host_dev_name":"tap1","guest_mac":"02:fc:00:00:00:15"}`,
		`PUT /network-interfaces/eth1 {"iface_id":"eth1","host_dev_name":"tap1","guest_mac":"nonsense"}`,
		`PUT /mmds/config {"version":"V2","network_interfaces":[]}`, `PUT /mmds/config {"version":"V2","network_interfaces":["eth7"]}`,
		`PUT /mmds/config {"version":"V3","network_interfaces":["eth0"]}`, `PUT /mmds/config {"version":"V2","network_interfaces":["eth0"],"ipv4_address":"8.8.8.8"}`,
		setMMDS, `PUT /mmds {"instanceID":"box"}`, `GET /mmds`, `PUT /mmds 5`, `PUT /mmds []`, `GET /mmds`, `PUT /mmds {`,
		`PUT /entropy {}`, `PUT /entropy {"more":1}`,
		`PUT /vsock {"guest_cid":3,"uds_path":"DIR/vsock"}`, `PUT /vsock {"guest_cid":2,"uds_path":"DIR/vsock2"}`,
		setBalloon, `PUT /balloon {"amount_mib":9999,"deflate_on_oom":true}`, `PUT /balloon {"amount_mib":1}`,
		`PUT /serial {"serial_out_path":"DIR/serial"}`, `PUT /serial {"more":1}`,
		`PUT /cpu-config {}`, `PUT /cpu-config {"cpuid_modifiers":[{"leaf":"0x1","subleaf":"0x0","flags":0,"modifiers":[{"register":"ecx","bitmap":"0bx"}]}]}`,
		`PUT /cpu-config {"msr_modifiers":[{"addr":"0x10a","bitmap":"0bxx1"}]}`, `PUT /cpu-config {"more":1}`,
		`PUT /logger {"level":"Warning"}`, `PUT /logger {"level":"Loud"}`, `PUT /metrics {"metrics_path":"DIR/metrics"}`, `PUT /metrics {"metrics_path":"DIR/metrics"}`,
	}},
	{"a life", []string{
		setKernel, setMemory, setRoot, setNetwork, setMMDS, setBalloon, `PUT /entropy {}`, `GET /`, boot, `GET /`,
		boot, setMemory, setKernel, setRoot, setNetwork, setBalloon, `PUT /entropy {}`, setMMDS, `PUT /cpu-config {}`,
		`PUT /mmds {"instanceID":"box"}`, `GET /mmds`, `PUT /vsock {"guest_cid":3,"uds_path":"DIR/vsock"}`, `PUT /serial {"serial_out_path":"DIR/serial"}`,
		`PUT /logger {"level":"Warning"}`, `PUT /metrics {"metrics_path":"DIR/metrics"}`, `PUT /actions {"action_type":"FlushMetrics"}`,
		`PATCH /drives/root {"drive_id":"root","path_on_host":"DIR/disk"}`, `PATCH /drives/root {"drive_id":"root"}`, `PATCH /drives/root {"drive_id":"other"}`, `PATCH /drives/none {"drive_id":"none"}`,
		`PATCH /drives/root {"drive_id":"root","rate_limiter":{"bandwidth":{"size":1024,"refill_time":100}}}`,
		`PATCH /network-interfaces/eth0 {"iface_id":"eth0","tx_rate_limiter":{"bandwidth":{"size":1024,"refill_time":100}}}`, `PATCH /network-interfaces/eth7 {"iface_id":"eth7"}`,
		`GET /balloon/statistics`, `GET /balloon/hinting/status`, `?PATCH /balloon {"amount_mib":1}`,
		`?PATCH /balloon/hinting/start`, `?PATCH /balloon/hinting/start {"acknowledge_on_stop":false}`, `?PATCH /balloon/hinting/stop`,
		`PATCH /balloon/hinting/jump`, `PATCH /balloon/hinting/start {"acknowledge_on_stop":7}`,
		full, pause, pause, `GET /`, full, diff, `PUT /snapshot/create {"snapshot_path":"DIR/state3"}`, `PUT /snapshot/create {"snapshot_path":"DIR/none/state","mem_file_path":"DIR/memory3"}`,
		`PUT /snapshot/create {"snapshot_path":"DIR/state3","mem_file_path":"DIR/none/memory"}`, `PUT /snapshot/create {"snapshot_type":"Half","snapshot_path":"DIR/state3","mem_file_path":"DIR/memory3"}`,
		`PUT /snapshot/load {"snapshot_path":"DIR/state",` + fromFile + `}`,
		resume, resume, `GET /`, `GET /machine-config`,
	}},
	{"no balloon", []string{
		setKernel, setMemory, boot, `PATCH /balloon {"amount_mib":1}`, `GET /balloon/statistics`, `PATCH /balloon/hinting/start`, `GET /balloon/hinting/status`, `PATCH /balloon/hinting/stop`,
		`PUT /mmds {"a":"b"}`, `GET /mmds`,
	}},
	{"a balloon without hinting", []string{
		setKernel, setMemory, `PUT /balloon {"amount_mib":0,"deflate_on_oom":true}`, boot, `GET /balloon/statistics`, `PATCH /balloon/hinting/start`, `GET /balloon/hinting/status`, `PATCH /balloon/hinting/stop`,
	}},
	{"load after configuring", []string{setMemory, `PUT /snapshot/load {"snapshot_path":"SAVED/state","mem_backend":{"backend_type":"File","backend_path":"SAVED/memory"}}`, `GET /`}},
	{"load after what configures no boot", []string{`PUT /logger {"level":"Warning"}`, `PUT /mmds {"a":"b"}`, `PUT /serial {"serial_out_path":"DIR/serial"}`,
		`PUT /snapshot/load {"snapshot_path":"SAVED/state","mem_backend":{"backend_type":"File","backend_path":"SAVED/memory"}}`, `GET /`, `GET /mmds`, `PUT /mmds {"a":"b"}`, `GET /mmds`, resume, pause, diff, full, `GET /`}},
	{"load", []string{`PUT /snapshot/load {"snapshot_path":"SAVED/state","mem_backend":{"backend_type":"File","backend_path":"SAVED/memory"},"track_dirty_pages":true,"network_overrides":[{"iface_id":"eth0","host_dev_name":"tap0"}],"clock_realtime":true}`,
		`GET /`, `GET /machine-config`, diff, resume, pause, diff, resume, `GET /`}},
	{"load and resume", []string{`PUT /snapshot/load {"snapshot_path":"SAVED/state","mem_backend":{"backend_type":"File","backend_path":"SAVED/memory"},"resume_vm":true}`, `GET /`}},
	{"load is checked", []string{`PUT /snapshot/load {"snapshot_path":"SAVED/state","mem_backend":{"backend_type":"File","backend_path":"SAVED/memory"},"more":true}`,
		`PUT /snapshot/load {"snapshot_path":"SAVED/state"}`, `PUT /snapshot/load {"mem_backend":{"backend_type":"File","backend_path":"SAVED/memory"}}`, `GET /`}},
	{"load what is missing", []string{`PUT /snapshot/load {"snapshot_path":"DIR/missing","mem_backend":{"backend_type":"File","backend_path":"SAVED/memory"}}`, `GET /`}},
	{"load what makes no sense", []string{`PUT /snapshot/load {"snapshot_path":"KERNEL","mem_backend":{"backend_type":"File","backend_path":"SAVED/memory"}}`, `GET /`}},
	{"load without memory", []string{`PUT /snapshot/load {"snapshot_path":"SAVED/state","mem_backend":{"backend_type":"File","backend_path":"DIR/missing"}}`, `GET /`}},
	{"load without a pager", []string{`PUT /snapshot/load {"snapshot_path":"SAVED/state","mem_backend":{"backend_type":"Uffd","backend_path":"DIR/missing"}}`, `GET /`}},
	{"load with a TAP too many", []string{`PUT /snapshot/load {"snapshot_path":"SAVED/state","mem_backend":{"backend_type":"File","backend_path":"SAVED/memory"},"network_overrides":[{"iface_id":"eth0","host_dev_name":"tap0"},{"iface_id":"eth9","host_dev_name":"tap0"}]}`, `GET /`}},
}

// inNamespace calls f on a thread in the network namespace, where what it starts is too.
func inNamespace(t *testing.T, path string, f func() error) {
	t.Helper()
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // which ends with this
		ns, err := os.Open(path)
		if err == nil {
			err = errors.Join(unix.Setns(int(ns.Fd()), unix.CLONE_NEWNET), ns.Close())
		}
		if err == nil {
			err = f()
		}
		done <- err
	}()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
}

// play makes the calls of a Firecracker of its own and gives what it answers.
func play(t *testing.T, binary, netns string, calls []string, words *strings.Replacer) []string {
	t.Helper()
	socket := filepath.Join(t.TempDir(), "api.sock")
	cmd := exec.Command(binary, "--api-sock", socket, "--id", "box")
	inNamespace(t, netns, cmd.Start)
	ended := make(chan struct{})
	go func() { defer close(ended); _ = cmd.Wait() }()
	defer func() {
		_ = cmd.Process.Kill() // may have ended
		<-ended
	}()
	dial := func(ctx context.Context, _, _ string) (net.Conn, error) {
		for {
			conn, err := new(net.Dialer).DialContext(ctx, "unix", socket)
			if err == nil {
				return conn, nil
			}
			select {
			case <-ended:
				return nil, err
			case <-time.After(time.Millisecond): // nothing tells that it listens
			}
		}
	}
	client := &http.Client{Timeout: 20 * time.Second, Transport: &http.Transport{DialContext: dial, DisableKeepAlives: true}}
	var answers []string
	for _, c := range calls {
		parts := append(strings.SplitN(strings.TrimPrefix(c, "?"), " ", 3), "")
		var body io.Reader
		if parts[2] != "" {
			body = strings.NewReader(words.Replace(parts[2]))
		}
		req, err := http.NewRequestWithContext(t.Context(), parts[0], "http://localhost"+parts[1], body)
		if err != nil {
			t.Fatal(err)
		}
		answers = append(answers, answer(client.Do(req)))
	}
	return answers
}

var quoted = regexp.MustCompile("`[^`]*`")

// answer is an answer in a form that can be compared. Of bodies that cannot be read
// only the first word is told that is wrong in them: the original says where it is, and
// what may be there.
func answer(resp *http.Response, err error) string {
	if err != nil {
		return "no answer"
	}
	defer resp.Body.Close()
	data, err := io.ReadAll(resp.Body)
	if err != nil {
		return "half an answer"
	}
	var body any
	if json.Unmarshal(data, &body) == nil {
		data, _ = json.Marshal(body) // in one order
	}
	if before, after, ok := bytes.Cut(data, []byte("deserializing the json body of a request: ")); ok {
		data = append(before, quoted.Find(after)...)
	}
	return fmt.Sprintf("%d %s", resp.StatusCode, data)
}

// What the tests without a Firecracker rely on: that the fake does what a real one does.
func TestFakeIsLikeReal(t *testing.T) {
	s := newRealSite(t)
	version := s.monitor(t, "", firecracker.Config{Jailer: firecracker.NoJailer}).Version()
	version, _, _ = strings.Cut(version, " ")
	if version != "1.16.1" {
		t.Skipf("the words are those of 1.16.1, and this is %s", version)
	}
	pretender := filepath.Join(t.TempDir(), fake.Prefix+version)
	if err := os.Link(s.binary, pretender); err != nil {
		t.Fatal(err)
	}
	netns, guest := s.slot(t).InnerNetNS, guestKernel(t)
	dirWithDisk := func() string {
		dir := t.TempDir()
		if err := os.WriteFile(filepath.Join(dir, "disk"), make([]byte, 4096), 0o600); err != nil {
			t.Fatal(err)
		}
		return dir
	}
	programs := []string{s.real, pretender}
	saved := []string{dirWithDisk(), dirWithDisk()}
	for i, program := range programs {
		calls := []string{setKernel, setMemory, setRoot, setNetwork, setMMDS, boot, pause, full}
		for j, a := range play(t, program, netns, calls, strings.NewReplacer("DIR", saved[i], "KERNEL", guest)) {
			if a != "204 " {
				t.Fatalf("%s: %s", calls[j], a)
			}
		}
	}
	for _, sc := range scenarios {
		t.Run(sc.name, func(t *testing.T) {
			var answers [2][]string
			for i, program := range programs {
				dir := dirWithDisk()
				answers[i] = play(t, program, netns, sc.calls, strings.NewReplacer("DIR", dir, "KERNEL", guest, "SAVED", saved[i]))
				for j := range answers[i] {
					answers[i][j] = strings.NewReplacer(dir, "DIR", saved[i], "SAVED").Replace(answers[i][j])
				}
			}
			for i, c := range sc.calls {
				real, fake := answers[0][i], answers[1][i]
				if c[0] == '?' {
					if !strings.Contains(real, "Device not activated yet") || fake != "204 " {
						t.Errorf("%s\nthe real one: %s\nthe fake:     %s", c[1:], real, fake)
					}
				} else if real != fake {
					t.Errorf("%s\nthe real one: %s\nthe fake:     %s", c, real, fake)
				}
			}
		})
	}
}
