package client

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
)

// CredentialsFile is the name, in the platform's data directory, of the file that
// tells the local operator's programs where the platform is.
const CredentialsFile = "credentials.json"

// ErrNoPlatform is returned when nothing says where a platform is.
var ErrNoPlatform = errors.New("no platform found: start one with `make up` or set E2B_API_URL and E2B_API_KEY")

// Credentials say where a platform is and who is asking.
type Credentials struct {
	APIURL     string `json:"api_url"`
	SandboxURL string `json:"sandbox_url"`       // empty: as APIURL
	APIKey     string `json:"api_key"`           // never to be logged
	Domain     string `json:"domain,omitempty"`  // host[:port] of sandbox host names, when TLS is served there
	CAFile     string `json:"ca_file,omitempty"` // authority (PEM) that clients of Domain have to trust, where it is the machine's own
}

// LoadCredentials reads the file that a platform wrote, DIR/credentials.json. The
// error is ErrNoPlatform when there is none.
func LoadCredentials(path string) (Credentials, error) {
	var c Credentials
	data, err := os.ReadFile(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return c, ErrNoPlatform
	case errors.Is(err, fs.ErrPermission):
		return c, fmt.Errorf("%w: run this as the user who started the platform, or set E2B_API_URL and E2B_API_KEY", err)
	case err != nil:
		return c, fmt.Errorf("read credentials: %w", err)
	}
	if err := json.Unmarshal(data, &c); err != nil {
		return Credentials{}, fmt.Errorf("read credentials in %s: %w", path, err)
	}
	if c.APIURL == "" || c.APIKey == "" {
		return Credentials{}, fmt.Errorf("read credentials in %s: api_url or api_key is missing", path)
	}
	return c, nil
}

// Save writes the credentials to the given file, readable by the owner only. A
// reader sees the old file or the new one, never a part.
func (c Credentials) Save(path string) error {
	data, err := json.MarshalIndent(c, "", "  ")
	if err != nil {
		return fmt.Errorf("encode credentials: %w", err)
	}
	tmp, err := os.CreateTemp(filepath.Dir(path), filepath.Base(path)+".tmp*") // mode 0600
	if err != nil {
		return fmt.Errorf("save credentials: %w", err)
	}
	_, err = tmp.Write(append(data, '\n'))
	if err == nil {
		err = tmp.Sync()
	}
	if closeErr := tmp.Close(); err == nil {
		err = closeErr
	}
	if err == nil {
		err = os.Rename(tmp.Name(), path)
	}
	if err != nil {
		os.Remove(tmp.Name())
		return fmt.Errorf("save credentials: %w", err)
	}
	return nil
}

// Environment returns the credentials that apply to this process: the variables
// that E2B's clients read, and for what they leave out the file in dataDir.
func Environment(dataDir string) (Credentials, error) {
	env := Credentials{
		APIURL:     os.Getenv("E2B_API_URL"),
		SandboxURL: os.Getenv("E2B_SANDBOX_URL"),
		APIKey:     os.Getenv("E2B_API_KEY"),
		Domain:     os.Getenv("E2B_DOMAIN"),
	}
	if env.APIURL == "" && env.Domain != "" {
		env.APIURL = "https://api." + env.Domain
	}
	if env.APIURL != "" && env.APIKey != "" {
		return env, nil
	}
	file, err := LoadCredentials(filepath.Join(dataDir, CredentialsFile))
	if err != nil {
		return Credentials{}, err
	}
	if env.APIKey != "" {
		file.APIKey = env.APIKey
	}
	if env.APIURL == "" || env.APIURL == file.APIURL {
		file.SandboxURL = cmp.Or(file.SandboxURL, file.APIURL)
		return file, nil
	}
	// The variables name another platform than the file: its key is not for them.
	return Credentials{}, fmt.Errorf("E2B_API_URL is set to %s but E2B_API_KEY is not: set both, or neither for the platform of %s", env.APIURL, dataDir)
}
