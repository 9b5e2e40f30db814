package template

import (
	"crypto/sha256"
	_ "embed"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
)

// hostCADir is where an operator of a Debian host puts authorities to trust; the
// image has its copies in the same place.
const hostCADir = "/usr/local/share/ca-certificates"

// ownCAPrefix begins the names of what `wrenn ca --install` puts there. Nothing
// inside has a use for it, and the template would be built again for it.
const ownCAPrefix = "wrenn-ca-"

// caBundle is the file with all trusted authorities, in the image.
const caBundle = "/etc/ssl/certs/ca-certificates.crt"

// setupScript runs as root inside the new system, after debootstrap.
//
//go:embed setup.sh
var setupScript string

// basePackages is what the base template has beyond the distribution's minimal
// system: what the shell of a person or an agent is expected to have.
var basePackages = []string{
	"bash", "bzip2", "ca-certificates", "curl", "file", "git", "iproute2", "iputils-ping",
	"jq", "less", "libnss-myhostname", "lsof", "nano", "netcat-openbsd", "nodejs", "npm",
	"openssh-client", "procps", "psmisc", "python-is-python3", "python3", "python3-pip",
	"python3-venv", "ripgrep", "rsync", "sudo", "tree", "unzip", "vim-tiny", "wget",
	"xz-utils", "zip",
}

// recipe is everything that decides what comes out of a build, but for the state
// of the distribution's archive on that day. Its hash is the build's id.
type recipe struct {
	Version  int // raised when the code that builds changes what comes out
	Suite    string
	Arch     string // the distribution's name for it
	Packages []string
	Setup    string            // the script run inside
	CAs      map[string]string `json:",omitempty"` // relative path → certificate, of the authorities put in
}

// baseRecipe returns the recipe of the base template on this host.
func baseRecipe(trustHostCAs bool, caDir string) (recipe, error) {
	r := recipe{
		Version:  1,
		Suite:    "bookworm",
		Arch:     runtime.GOARCH,
		Packages: basePackages,
		Setup:    setupScript,
	}
	if !trustHostCAs {
		return r, nil
	}
	var err error
	r.CAs, err = readCAs(caDir)
	return r, err
}

// id is 20 characters of [0-9a-f].
func (r recipe) id() string {
	data, err := json.Marshal(r)
	if err != nil {
		panic(err) // strings, numbers and lists of them: cannot fail
	}
	sum := sha256.Sum256(data)
	return hex.EncodeToString(sum[:])[:20]
}

// env is the environment that every process of the image gets. Programs that
// bring authorities of their own (a node or a certifi installed later) are
// pointed at the image's when the operator added some.
func (r recipe) env() map[string]string {
	env := map[string]string{
		"LANG": "C.UTF-8",
		"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
	}
	if len(r.CAs) > 0 {
		for _, name := range []string{"SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "NODE_EXTRA_CA_CERTS"} {
			env[name] = caBundle
		}
	}
	return env
}

// readCAs returns the *.crt files below dir by their relative path, links
// followed as update-ca-certificates does. No directory: none.
func readCAs(dir string) (map[string]string, error) {
	cas := map[string]string{}
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() || !strings.HasSuffix(path, ".crt") || strings.HasPrefix(d.Name(), ownCAPrefix) {
			return err
		}
		pem, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(dir, path)
		if err != nil {
			return err
		}
		cas[rel] = string(pem)
		return nil
	})
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read the host's certificate authorities: %w", err)
	}
	return cas, nil
}

// install writes into the tree at root what the setup script expects to find.
func (r recipe) install(root string) error {
	for rel, pem := range r.CAs {
		path := filepath.Join(root, hostCADir, rel)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			return err
		}
		if err := os.WriteFile(path, []byte(pem), 0o644); err != nil {
			return err
		}
	}
	env := r.env()
	var environment, profile strings.Builder
	for _, name := range slices.Sorted(maps.Keys(env)) {
		fmt.Fprintf(&environment, "%s=%s\n", name, env[name])
		if name != "PATH" { // /etc/profile sets it by who logs in
			fmt.Fprintf(&profile, "export %s=%s\n", name, env[name])
		}
	}
	pipConf := "[global]\ndisable-pip-version-check = true\n"
	if len(r.CAs) > 0 {
		pipConf += "cert = " + caBundle + "\n"
	}
	for path, text := range map[string]string{
		"etc/environment":          environment.String(),
		"etc/profile.d/00-env.sh":  profile.String(),
		"etc/pip.conf":             pipConf,
		"etc/dpkg/dpkg.cfg.d/lean": leanDpkg,
	} {
		if err := os.WriteFile(filepath.Join(root, path), []byte(text), 0o644); err != nil {
			return err
		}
	}
	return nil
}

// leanDpkg keeps out, now and when packages are installed later, what a sandbox
// does not read, and the mark that makes pip refuse to install outside a virtual
// environment: the whole system is as short-lived as one.
const leanDpkg = `path-exclude=/usr/share/doc/*
path-include=/usr/share/doc/*/copyright
path-exclude=/usr/share/info/*
path-exclude=/usr/share/locale/*
path-exclude=/usr/share/man/*
path-exclude=/usr/lib/python3*/EXTERNALLY-MANAGED
`
