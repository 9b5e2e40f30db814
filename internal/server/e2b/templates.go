package e2b

import (
	"crypto/sha256"
	"fmt"
	"net/http"
	"regexp"
	"strings"
	"time"

	"github.com/wrenn/wrenn/internal/store"
)

type templateResponse struct {
	TemplateID    string     `json:"templateID"`
	BuildID       string     `json:"buildID"`
	CPUCount      int        `json:"cpuCount"`
	MemoryMB      int64      `json:"memoryMB"`
	DiskSizeMB    int64      `json:"diskSizeMB"`
	Public        bool       `json:"public"`
	Aliases       []string   `json:"aliases"`
	Names         []string   `json:"names"`
	CreatedAt     time.Time  `json:"createdAt"`
	UpdatedAt     time.Time  `json:"updatedAt"`
	CreatedBy     *struct{}  `json:"createdBy"`     // null: nobody is on record
	LastSpawnedAt *time.Time `json:"lastSpawnedAt"` // null: not on record
	SpawnCount    int64      `json:"spawnCount"`
	BuildCount    int64      `json:"buildCount"`
	EnvdVersion   string     `json:"envdVersion"`
	BuildStatus   string     `json:"buildStatus"`
}

type templateBuild struct {
	BuildID     string    `json:"buildID"`
	Status      string    `json:"status"`
	CreatedAt   time.Time `json:"createdAt"`
	UpdatedAt   time.Time `json:"updatedAt"`
	FinishedAt  time.Time `json:"finishedAt"`
	CPUCount    int       `json:"cpuCount"`
	MemoryMB    int64     `json:"memoryMB"`
	DiskSizeMB  int64     `json:"diskSizeMB"`
	EnvdVersion string    `json:"envdVersion"`
}

type templateWithBuilds struct {
	templateResponse
	Builds []templateBuild `json:"builds"`
}

func (a *api) template(t store.Template) templateResponse {
	version := t.EnvdVersion
	if version == "" {
		version = a.envdVersion
	}
	return templateResponse{
		TemplateID: t.ID, BuildID: t.BuildID, CPUCount: t.CPUs, MemoryMB: t.MemoryMiB, DiskSizeMB: t.DiskMiB,
		Public: t.Public, Aliases: []string{t.Alias}, Names: []string{t.Alias},
		CreatedAt: timestamp(t.Created), UpdatedAt: timestamp(t.Updated),
		BuildCount: 1, EnvdVersion: version, BuildStatus: "ready",
	}
}

func (a *api) listTemplates(c *call) error {
	query, err := c.query()
	if err != nil {
		return err
	}
	if team := query.Get("teamID"); team != "" && team != c.team.ID && team != c.team.Slug {
		return &statusError{status: http.StatusForbidden, message: "the API key is not of that team"}
	}
	if _, err := c.integer("limit", maxPage, 1, maxPage); err != nil {
		return err
	}
	if query.Get("nextToken") != "" { // all fit on one page as yet
		return invalid("nextToken: not one that this server gave out")
	}
	templates, err := a.plane.Templates(c.r.Context(), c.team.ID)
	if err != nil {
		return err
	}
	list := make([]templateResponse, 0, len(templates))
	for _, t := range templates {
		list = append(list, a.template(t))
	}
	return writeJSON(c.w, http.StatusOK, list)
}

func (a *api) getTemplate(c *call) error {
	t, err := a.plane.Template(c.r.Context(), c.team.ID, c.params["templateID"])
	if err != nil {
		return err
	}
	out := a.template(t)
	return writeJSON(c.w, http.StatusOK, templateWithBuilds{out, []templateBuild{{
		BuildID: asUUID(t.BuildID), Status: out.BuildStatus, CreatedAt: out.UpdatedAt, UpdatedAt: out.UpdatedAt,
		FinishedAt: out.UpdatedAt, CPUCount: out.CPUCount, MemoryMB: out.MemoryMB, DiskSizeMB: out.DiskSizeMB,
		EnvdVersion: out.EnvdVersion,
	}}})
}

func (a *api) getAlias(c *call) error {
	t, err := a.plane.Template(c.r.Context(), c.team.ID, c.params["alias"])
	if err != nil {
		return err
	}
	return writeJSON(c.w, http.StatusOK, map[string]any{"templateID": t.ID, "public": t.Public})
}

var uuidPattern = regexp.MustCompile(`^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$`)

// asUUID gives a build id the form of a UUID, which is the only one that the
// Python client takes here.
func asUUID(id string) string {
	if uuidPattern.MatchString(strings.ToLower(id)) {
		return id
	}
	h := sha256.Sum256([]byte(id))
	h[6], h[8] = h[6]&0x0f|0x80, h[8]&0x3f|0x80 // version 8, the variant of RFC 9562
	return fmt.Sprintf("%x-%x-%x-%x-%x", h[:4], h[4:6], h[6:8], h[8:10], h[10:16])
}
