package user

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"
)

func newDatabase(t testing.TB, passwd, group string) *database {
	t.Helper()
	dir := t.TempDir()
	d := &database{passwd: filepath.Join(dir, "passwd"), group: filepath.Join(dir, "group")}
	for path, text := range map[string]string{d.passwd: passwd, d.group: group} {
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return d
}

func TestAccountsAreFoundAmongWhateverElseIsInTheFile(t *testing.T) {
	d := newDatabase(t, strings.Join([]string{
		"# comment:x:1:1::/:", "", ":x:2:2::/:", "+nis::::::", "short:x:3", "letters:x:a:b::/:", "huge:x:4294967296:1::/:",
		"last:x:4294967295:1::/:", "negative:x:-1:1::/:", "root:x:0:0:root:/root:/bin/sh", "  ann:x:1000:1001:A, B:/home/ann:/bin/sh:more:more\r",
		"ann:x:7:7::/second:", "nohome:x:1002:1002::", "noshell:x:1003:1003::/h", "odd\xff:x:1004:1004::/odd:", "zero\x00:x:5:5::/:",
		"1005:x:1006:1006::/num:", strings.Repeat("l", 1<<20) + ":x:9:9::/:", "end:x:8:8::/end:",
	}, "\n"), "")
	for name, want := range map[string]User{
		"root": {Name: "root", Home: "/root"}, "ann": {Name: "ann", UID: 1000, GID: 1001, Home: "/home/ann"},
		"nohome": {Name: "nohome", UID: 1002, GID: 1002}, "noshell": {Name: "noshell", UID: 1003, GID: 1003, Home: "/h"},
		"odd\xff": {Name: "odd\xff", UID: 1004, GID: 1004, Home: "/odd"}, "1005": {Name: "1005", UID: 1006, GID: 1006, Home: "/num"},
		"end": {Name: "end", UID: 8, GID: 8, Home: "/end"},
	} {
		for range 2 { // from the file, and from memory
			got, err := d.account(name)
			if want.Home == "" && name == "nohome" {
				want.Home = got.Home
			}
			if err != nil || fmt.Sprint(got) != fmt.Sprint(want) {
				t.Errorf("%q: got %+v, %v, want %+v", name, got, err, want)
			}
		}
	}
	for _, name := range []string{"", "#", "# comment", "+nis", "short", "letters", "huge", "last", "negative", "zero\x00", "zero", "1000", "who"} {
		got, err := d.account(name)
		if unknown := (UnknownError{}); !errors.As(err, &unknown) || err.Error() != "invalid username: '"+name+"'" {
			t.Errorf("%q: got %+v, %v", name, got, err)
		}
	}
	if name := d.userName(1000); name != "ann" {
		t.Errorf("uid 1000 is %q", name)
	}
	if name := d.userName(77777); name != "" {
		t.Errorf("uid 77777 is %q", name)
	}
}

func TestGroupsOfAnAccount(t *testing.T) {
	d := newDatabase(t, "ann:x:1000:1001::/:\nlone:x:5:5::/:\n", strings.Join([]string{
		"own:x:1001:", "a:x:20:ann", "b:x:21:bob, ann ,eve", "again:x:20:ann", "own2:x:1001:ann", "prefix:x:22:anna,an",
		"short:x:23", "bad:x:y:ann", "max:x:4294967295:ann", "#off:x:24:ann", "long:x:25:" + strings.Repeat("x,", 1<<19) + "ann", "",
	}, "\n"))
	u, err := d.withGroups("ann")
	if want := []uint32{1001, 20, 21, 25}; err != nil || !slices.Equal(u.Groups, want) {
		t.Errorf("got %v, %v, want %v", u.Groups, err, want)
	}
	if u, err := d.withGroups("lone"); err != nil || !slices.Equal(u.Groups, []uint32{5}) {
		t.Errorf("got %v, %v", u, err)
	}
	if name := d.groupName(21); name != "b" {
		t.Errorf("gid 21 is %q", name)
	}
}

func TestAChangeOfTheFilesIsSeenAtOnce(t *testing.T) {
	d := newDatabase(t, "ann:x:1:1::/a:\n", "")
	for _, path := range []string{d.passwd, d.group} {
		old := time.Now().Add(-time.Hour)
		os.Chtimes(path, old, old)
	}
	for i := range 50 { // of one size, in place and often within one tick of the clock
		if err := os.WriteFile(d.passwd, fmt.Appendf(nil, "ann:x:%d:1::/a:\n", i%10), 0o644); err != nil {
			t.Fatal(err)
		}
		if u, err := d.account("ann"); err != nil || u.UID != uint32(i%10) {
			t.Fatalf("after change %d: got %+v, %v", i, u, err)
		}
	}
	os.Remove(d.passwd)
	if _, err := d.account("ann"); !errors.As(err, new(UnknownError)) {
		t.Errorf("without a file: %v", err)
	}
	if u, err := d.account("root"); err != nil || u.UID != 0 || u.Home != "/root" {
		t.Errorf("root without a file: %+v, %v", u, err)
	}
}

func TestWhatIsNoFileIsNotWaitedFor(t *testing.T) {
	d := newDatabase(t, "", "")
	os.Remove(d.passwd)
	if err := syscall.Mkfifo(d.passwd, 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := d.account("ann"); err == nil || errors.As(err, new(UnknownError)) {
		t.Errorf("got %v, want that the file cannot be read", err)
	}
}

func FuzzAccountsAndGroups(f *testing.F) {
	f.Add([]byte("root:x:0:0:root:/root:/bin/sh\nann:x:1:1::/home/ann:"), []byte("a:x:1:ann,root\n"), "ann")
	f.Add([]byte("a:b:4294967295:-1:::\x00\n:::::::\n+\n"), []byte(":::\na:x:99999999999:,,,"), "")
	f.Add([]byte("\xff:x:1:1::/\xff:\r\n"), []byte("\xff:x:1:\xff\r\n"), "\xff")
	f.Fuzz(func(t *testing.T, passwd, group []byte, name string) {
		d := newDatabase(t, string(passwd), string(group))
		u, err := d.withGroups(name)
		if err != nil {
			return
		}
		if u.Name != name || strings.ContainsRune(u.Name+u.Home, 0) || strings.Contains(u.Home, "\n") {
			t.Errorf("got account %+v for %q", u, name)
		}
		if u.UID == 1<<32-1 || u.GID == 1<<32-1 || len(u.Groups) == 0 || u.Groups[0] != u.GID {
			t.Errorf("got ids %+v", u)
		}
	})
}
