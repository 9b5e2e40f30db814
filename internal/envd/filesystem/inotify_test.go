package filesystem

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"
	"golang.org/x/sys/unix"

	rpc "github.com/wrenn/wrenn/api/proto/filesystem"
	"github.com/wrenn/wrenn/internal/envd/settings"
)

func rawEvent(wd int32, mask uint32, name string) []byte {
	b := make([]byte, eventHeader+(len(name)+16)/16*16)
	binary.NativeEndian.PutUint32(b, uint32(wd))
	binary.NativeEndian.PutUint32(b[4:], mask)
	binary.NativeEndian.PutUint32(b[12:], uint32(len(b)-eventHeader))
	copy(b[eventHeader:], name)
	return b
}

func bareWatch(t testing.TB, root string) *watch {
	w, err := newWatch(context.Background(), root, true)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(w.Close)
	return w
}

func TestOneKernelEventGivesItsChangesInOrder(t *testing.T) {
	dir := t.TempDir()
	w := bareWatch(t, dir)
	wd := slices.Collect(maps.Keys(w.dirs))[0]
	var got []string
	emit := func(c change) error {
		got = append(got, strings.TrimPrefix(c.kind.String(), "EVENT_TYPE_"))
		return nil
	}
	all := uint32(unix.IN_CREATE | unix.IN_MOVED_FROM | unix.IN_ATTRIB | unix.IN_MODIFY | unix.IN_DELETE)
	if err := w.handle(t.Context(), wd, all, "f", emit); err != nil {
		t.Fatal(err)
	}
	if want := []string{"CREATE", "RENAME", "CHMOD", "WRITE", "REMOVE"}; !slices.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
}

func FuzzEventsOfTheKernel(f *testing.F) {
	f.Add(rawEvent(1, unix.IN_CREATE, "f"))
	f.Add(append(rawEvent(1, unix.IN_MOVED_FROM|unix.IN_ISDIR, "d"), rawEvent(1, unix.IN_MOVED_TO|unix.IN_ISDIR, "e")...))
	f.Add(rawEvent(1, unix.IN_Q_OVERFLOW, ""))
	f.Add([]byte{1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 255, 255, 255, 255})
	f.Fuzz(func(t *testing.T, raw []byte) {
		dir := t.TempDir()
		if err := os.Mkdir(dir+"/d", 0o755); err != nil {
			t.Fatal(err)
		}
		w := bareWatch(t, dir)
		_ = parseEvents(raw, func(wd int32, mask uint32, name string) error {
			return w.handle(t.Context(), wd, mask, name, func(c change) error {
				if rel, err := filepath.Rel(dir, c.path); err != nil || rel == ".." || strings.HasPrefix(rel, "../") {
					t.Errorf("%q with mask %x told of %s", name, mask, c.path)
				}
				return nil
			})
		})
	})
}

// mirror keeps the set of files that the events tell of.
type mirror map[string]bool

func (m mirror) apply(w *watch, c change) {
	name, _ := filepath.Rel(w.root, c.path)
	switch c.kind {
	case rpc.EventType_EVENT_TYPE_CREATE:
		m[name] = true
	case rpc.EventType_EVENT_TYPE_REMOVE, rpc.EventType_EVENT_TYPE_RENAME:
		for known := range m {
			if known == name || strings.HasPrefix(known, name+"/") {
				delete(m, known)
			}
		}
	}
}

func onDisk(t *testing.T, root string) mirror {
	t.Helper()
	m := mirror{}
	err := filepath.WalkDir(root, func(path string, _ os.DirEntry, err error) error {
		if path != root {
			m[strings.TrimPrefix(path, root+"/")] = true
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return m
}

func TestEventsOfAStormTellWhatIsThereInTheEnd(t *testing.T) {
	for seed := range uint64(20) {
		dir := t.TempDir()
		w := bareWatch(t, dir)
		rnd := rand.New(rand.NewPCG(seed, 1))
		stormed := make(chan struct{})
		go func() {
			defer close(stormed)
			pick := func() string {
				parts := []string{dir}
				for range 1 + rnd.IntN(3) {
					parts = append(parts, string(rune('a'+rnd.IntN(3))))
				}
				return filepath.Join(parts...)
			}
			for range 500 {
				switch rnd.IntN(6) {
				case 0:
					os.MkdirAll(pick(), 0o755)
				case 1:
					os.Rename(pick(), pick())
				case 2:
					os.RemoveAll(pick())
				case 3:
					unix.Renameat2(unix.AT_FDCWD, pick(), unix.AT_FDCWD, pick(), unix.RENAME_EXCHANGE)
				default:
					os.WriteFile(pick()+"/f"+string(rune('0'+rnd.IntN(3))), []byte("x"), 0o644)
				}
			}
			os.WriteFile(dir+"/end", nil, 0o644)
		}()
		seen := mirror{}
		done := errors.New("done")
		err := w.run(t.Context(), func(c change) error {
			seen.apply(w, c)
			if c.path == dir+"/end" {
				return done
			}
			return nil
		})
		<-stormed
		want := onDisk(t, dir)
		if !errors.Is(err, done) || fmt.Sprint(seen) != fmt.Sprint(want) {
			t.Fatalf("seed %d: %v\n seen %v\n disk %v", seed, err, seen, want)
		}
	}
}

func TestAThousandNestedDirectoriesAreWatchedWithoutAGap(t *testing.T) {
	dir := otherFS(t, "64m") // fast, however busy the disk is
	w := bareWatch(t, dir)
	deep := dir + strings.Repeat("/d", 1000)
	made := make(chan error, 1)
	go func() {
		err := os.MkdirAll(deep, 0o755)
		for p := deep; err == nil && len(p) > len(dir); p = filepath.Dir(p) {
			err = os.WriteFile(p+"/f", nil, 0o644)
		}
		if err == nil {
			err = os.WriteFile(dir+"/end", nil, 0o644)
		}
		made <- err
	}()
	seen := mirror{}
	ended, cancel := context.WithTimeout(t.Context(), 60*time.Second)
	defer cancel()
	done := errors.New("done")
	err := w.run(ended, func(c change) error {
		seen.apply(w, c)
		if len(seen) == 2001 {
			return done
		}
		return nil
	})
	if err := <-made; err != nil {
		t.Fatal(err)
	}
	if !errors.Is(err, done) {
		t.Fatalf("%d of 2001 files seen: %v", len(seen), err)
	}
}

func TestTheEndOfTheWatchedDirectoryEndsTheWatch(t *testing.T) {
	for name, end := range map[string]func(string) error{
		"REMOVE": os.Remove,
		"RENAME": func(dir string) error { return os.Rename(dir, dir+"-moved") },
	} {
		dir := filepath.Join(t.TempDir(), "watched")
		if err := os.Mkdir(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		w := bareWatch(t, dir)
		if err := end(dir); err != nil {
			t.Fatal(err)
		}
		var last string
		err := w.run(t.Context(), func(c change) error {
			last = strings.TrimPrefix(c.kind.String(), "EVENT_TYPE_")
			return nil
		})
		if connect.CodeOf(watchError(err)) != connect.CodeNotFound || last != name {
			t.Errorf("%s: got %v after %s", name, err, last)
		}
	}
}

// tells runs w until a file called end is told of, and returns what it told.
func tells(t *testing.T, w *watch) (told []string, err error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	end := errors.New("end")
	err = w.run(ctx, func(c change) error {
		name, _ := filepath.Rel(w.root, c.path)
		told = append(told, strings.TrimPrefix(c.kind.String(), "EVENT_TYPE_")+" "+name)
		if filepath.Base(name) == "end" {
			return end
		}
		return nil
	})
	if errors.Is(err, end) {
		err = nil
	}
	return told, err
}

func TestSwappedDirectoriesAreWatchedBoth(t *testing.T) {
	for _, kind := range []string{"directory", "file"} {
		dir := t.TempDir()
		must(t, os.Mkdir(dir+"/a", 0o755), os.Mkdir(dir+"/b", 0o755))
		if kind == "file" {
			must(t, os.Remove(dir+"/a"), os.WriteFile(dir+"/a", nil, 0o644))
		}
		w := bareWatch(t, dir)
		must(t, unix.Renameat2(unix.AT_FDCWD, dir+"/a", unix.AT_FDCWD, dir+"/b", unix.RENAME_EXCHANGE), os.WriteFile(dir+"/end", nil, 0o644))
		told, err := tells(t, w)
		if want := []string{"RENAME a", "CREATE b", "RENAME b", "CREATE b", "CREATE a", "CREATE end"}; err != nil || !slices.Equal(told, want) {
			t.Errorf("%s: told %q, %v", kind, told, err)
		}
		for _, in := range []string{"/a", "/b"} {
			if kind == "file" && in == "/b" {
				continue
			}
			must(t, os.WriteFile(dir+in+"/end", nil, 0o644))
			if told, err := tells(t, w); err != nil || !slices.Equal(told, []string{"CREATE " + in[1:] + "/end"}) {
				t.Errorf("%s: in %s: told %q, %v", kind, in, told, err)
			}
		}
	}
}

// The kernel does not tell of it, but from then on the paths lead elsewhere.
func TestADirectoryMadeAfterOneAboveTheRootWasMovedEndsTheWatch(t *testing.T) {
	for _, replaced := range []bool{false, true} {
		dir := t.TempDir()
		must(t, os.MkdirAll(dir+"/above/root", 0o755))
		w := bareWatch(t, dir+"/above/root")
		must(t, os.Rename(dir+"/above", dir+"/moved"))
		if replaced {
			must(t, os.MkdirAll(dir+"/above/root/new", 0o755))
		}
		must(t, os.Mkdir(dir+"/moved/root/new", 0o755))
		told, err := tells(t, w)
		if !errors.Is(err, errRootGone) || !slices.Equal(told, []string{"CREATE new", "RENAME ."}) {
			t.Errorf("told %q, %v", told, err)
		}
	}
}

func TestAWatchThatHasEndedTouchesNoOther(t *testing.T) {
	for range 100 { // until the kernel gives the same descriptor again
		dirs := []string{t.TempDir(), t.TempDir()}
		for _, dir := range dirs {
			must(t, os.Mkdir(dir+"/d", 0o755))
		}
		ended := bareWatch(t, dirs[0])
		ended.Close()
		other := bareWatch(t, dirs[1])
		ended.forget(dirs[0]+"/d", unix.IN_ISDIR|unix.IN_MOVED_FROM)
		must(t, os.WriteFile(dirs[1]+"/d/f", nil, 0o644), os.WriteFile(dirs[1]+"/end", nil, 0o644))
		if told, err := tells(t, other); err != nil || !slices.Equal(told, []string{"CREATE d/f", "CREATE end"}) {
			t.Fatalf("told %q, %v", told, err)
		}
	}
}

func TestAWatcherThatNobodyPollsExpires(t *testing.T) {
	s := NewService(&settings.Settings{}, slog.New(slog.DiscardHandler))
	t.Cleanup(s.Close)
	s.watchers.idle = 50 * time.Millisecond
	made, err := s.CreateWatcher(t.Context(), &rpc.CreateWatcherRequest{Path: t.TempDir()})
	if err != nil {
		t.Fatal(err)
	}
	s.watchers.mu.Lock()
	p := s.watchers.watchers[made.GetWatcherId()]
	s.watchers.mu.Unlock()
	<-p.ended
	_, err = s.GetWatcherEvents(t.Context(), &rpc.GetWatcherEventsRequest{WatcherId: made.GetWatcherId()})
	if connect.CodeOf(err) != connect.CodeNotFound {
		t.Errorf("got %v", err)
	}
}

func TestEventsThatWaitAreBounded(t *testing.T) {
	var r registry
	p := &poller{}
	e := &rpc.FilesystemEvent{Name: strings.Repeat("n", 1<<20)}
	kept := 0
	for kept < 1000 && r.keep(p, e) == nil {
		kept++
	}
	if kept == 0 || kept > maxBuffered>>20 {
		t.Errorf("%d MiB kept", kept)
	}
	if r.take(p); r.buffered != 0 || r.keep(p, e) != nil {
		t.Errorf("after they were fetched %d bytes count", r.buffered)
	}
}
