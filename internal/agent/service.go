package agent

import (
	"context"
	"errors"
	"net/http"
	goruntime "runtime"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/wrenn/wrenn/api/proto/hostagent"
	"github.com/wrenn/wrenn/api/proto/hostagent/hostagentconnect"
	"github.com/wrenn/wrenn/internal/guest"
	"github.com/wrenn/wrenn/internal/network"
	"github.com/wrenn/wrenn/internal/runtime"
	"github.com/wrenn/wrenn/internal/sandbox"
)

const heartbeatInterval = 15 * time.Second

// Handler serves the agent's RPC interface at the path it returns.
func (a *Agent) Handler() (path string, h http.Handler) {
	return hostagentconnect.NewHostAgentHandler(&service{a}, connect.WithInterceptors(connect.UnaryInterceptorFunc(a.logCauses)))
}

// service turns RPCs into calls of the agent, and kinds of errors into codes.
type service struct{ agent *Agent }

var _ hostagentconnect.HostAgentHandler = (*service)(nil)

func (s *service) GetHost(context.Context, *hostagent.GetHostRequest) (*hostagent.GetHostResponse, error) {
	total, err := totalMemory()
	if err != nil {
		return nil, rpcError(err)
	}
	rt := s.agent.cfg.Runtime
	return &hostagent.GetHostResponse{
		Runtime: rt.Name(), RuntimeVersion: rt.Version(),
		Cpus: int32(goruntime.NumCPU()), MemoryMib: total >> 20,
		Sandboxes: int32(len(s.agent.list())),
	}, nil
}

func (s *service) CreateSandbox(ctx context.Context, req *hostagent.CreateSandboxRequest) (*hostagent.CreateSandboxResponse, error) {
	id, err := sandbox.ParseID(req.GetSandboxId())
	if err != nil {
		return nil, rpcError(err)
	}
	if !buildIDPattern.MatchString(req.GetBuildId()) {
		return nil, rpcError(sandbox.Errorf(sandbox.ErrInvalid, "malformed build id"))
	}
	imageID, err := optionalID(req.GetImageId())
	if err != nil {
		return nil, rpcError(err)
	}
	switch req.GetStart() {
	case "", fromImage, fromBoot:
	default:
		return nil, rpcError(sandbox.Errorf(sandbox.ErrInvalid, "start: want nothing, image or boot"))
	}
	m, from, err := s.agent.create(ctx, createRequest{
		id: id, templateID: req.GetTemplateId(), buildID: req.GetBuildId(),
		resources:   resources(req.GetResources()),
		policy:      network.Policy{AllowInternet: req.GetAllowInternetAccess()},
		accessToken: req.GetAccessToken(), envVars: req.GetEnvVars(),
		defaultUser: req.GetDefaultUser(), defaultWorkdir: req.GetDefaultWorkdir(),
		imageID: imageID, imageToken: req.GetImageAccessToken(), start: req.GetStart(),
	})
	if err != nil {
		return nil, rpcError(err)
	}
	rec, addr, _ := m.status()
	return &hostagent.CreateSandboxResponse{Address: addr.String(), EnvdVersion: rec.EnvdVersion, StartedFrom: from}, nil
}

func resources(r *hostagent.Resources) sandbox.Resources {
	return sandbox.Resources{CPUs: int(r.GetCpus()), MemoryMiB: r.GetMemoryMib(), DiskMiB: r.GetDiskMib(), PIDs: r.GetPids()}
}

func optionalID(text string) (sandbox.ID, error) {
	if text == "" {
		return "", nil
	}
	return sandbox.ParseID(text)
}

// find returns the sandbox of that id, or sandbox.ErrNotFound.
func (s *service) find(id string) (*managed, error) {
	if m := s.agent.get(sandbox.ID(id)); m != nil {
		return m, nil
	}
	if ob, ok := s.agent.ended.find(sandbox.ID(id)); ok {
		return nil, sandbox.Errorf(sandbox.ErrNotFound, "sandbox %s ended: %s", id, ob.Reason)
	}
	return nil, sandbox.Errorf(sandbox.ErrNotFound, "there is no sandbox %s", id)
}

func (s *service) PauseSandbox(ctx context.Context, req *hostagent.PauseSandboxRequest) (*hostagent.PauseSandboxResponse, error) {
	m, err := s.find(req.GetSandboxId())
	if err != nil {
		return nil, rpcError(err)
	}
	kind := runtime.ImageMemory
	if req.GetFilesOnly() {
		kind = runtime.ImageFiles
	}
	size, err := s.agent.pause(ctx, m, kind)
	if err != nil {
		return nil, rpcError(err)
	}
	return &hostagent.PauseSandboxResponse{ImageBytes: size}, nil
}

func (s *service) ResumeSandbox(ctx context.Context, req *hostagent.ResumeSandboxRequest) (*hostagent.ResumeSandboxResponse, error) {
	m, err := s.find(req.GetSandboxId())
	if err != nil {
		return nil, rpcError(err)
	}
	booted, err := s.agent.resume(ctx, m, req.GetAccessToken(), req.GetBoot())
	if err != nil {
		return nil, rpcError(err)
	}
	rec, addr, _ := m.status()
	return &hostagent.ResumeSandboxResponse{Address: addr.String(), EnvdVersion: rec.EnvdVersion, Booted: booted}, nil
}

func (s *service) SnapshotSandbox(ctx context.Context, req *hostagent.SnapshotSandboxRequest) (*hostagent.SnapshotSandboxResponse, error) {
	id, err := sandbox.ParseID(req.GetImageId())
	if err != nil {
		return nil, rpcError(err)
	}
	m, err := s.find(req.GetSandboxId())
	if err != nil {
		return nil, rpcError(err)
	}
	im, err := s.agent.snapshot(ctx, m, id)
	if err != nil {
		return nil, rpcError(err)
	}
	return &hostagent.SnapshotSandboxResponse{ImageBytes: im.bytes(), Kind: string(im.Kind)}, nil
}

func (s *service) DeleteImage(_ context.Context, req *hostagent.DeleteImageRequest) (*hostagent.DeleteImageResponse, error) {
	id, err := sandbox.ParseID(req.GetImageId())
	if err == nil {
		err = removeImage(s.agent.imageDir(id))
	}
	if err != nil {
		return nil, rpcError(err)
	}
	return &hostagent.DeleteImageResponse{}, nil
}

func (s *service) ListImages(context.Context, *hostagent.ListImagesRequest) (*hostagent.ListImagesResponse, error) {
	images, err := s.agent.images()
	if err != nil {
		return nil, rpcError(err)
	}
	resp := &hostagent.ListImagesResponse{}
	for id, im := range images {
		resp.Images = append(resp.Images, &hostagent.Image{ImageId: string(id), Bytes: im.bytes(), CreatedAt: timestamppb.New(im.Created)})
	}
	return resp, nil
}

func (s *service) PrepareTemplate(_ context.Context, req *hostagent.PrepareTemplateRequest) (*hostagent.PrepareTemplateResponse, error) {
	if !buildIDPattern.MatchString(req.GetBuildId()) {
		return nil, rpcError(sandbox.Errorf(sandbox.ErrInvalid, "malformed build id"))
	}
	if _, err := s.agent.rootfs(req.GetBuildId()); err != nil {
		return nil, rpcError(err)
	}
	s.agent.pool.pin(shelfKey{build: req.GetBuildId(), resources: resources(req.GetResources())})
	return &hostagent.PrepareTemplateResponse{}, nil
}

func (s *service) StopSandbox(_ context.Context, req *hostagent.StopSandboxRequest) (*hostagent.StopSandboxResponse, error) {
	if m := s.agent.get(sandbox.ID(req.GetSandboxId())); m != nil {
		if err := s.agent.stop(m, "it was killed"); err != nil {
			return nil, rpcError(err)
		}
	}
	return &hostagent.StopSandboxResponse{}, nil
}

func (s *service) SetAccessToken(_ context.Context, req *hostagent.SetAccessTokenRequest) (*hostagent.SetAccessTokenResponse, error) {
	m, err := s.find(req.GetSandboxId())
	if err != nil {
		return nil, rpcError(err)
	}
	if _, _, c := m.status(); c != nil {
		c.SetToken(req.GetAccessToken())
	}
	return &hostagent.SetAccessTokenResponse{}, nil
}

func (s *service) ListSandboxes(context.Context, *hostagent.ListSandboxesRequest) (*hostagent.ListSandboxesResponse, error) {
	resp := &hostagent.ListSandboxesResponse{}
	// The living first: one that ends meanwhile is then on both lists, and not
	// on neither.
	for _, m := range s.agent.list() {
		rec, addr, _ := m.status()
		st := &hostagent.SandboxStatus{
			SandboxId: string(m.id), State: string(rec.State), ChangedAt: timestamppb.New(rec.Changed), ImageBytes: rec.ImageBytes,
		}
		if addr.IsValid() {
			st.Address = addr.String()
		}
		resp.Sandboxes = append(resp.Sandboxes, st)
	}
	for _, ob := range s.agent.ended.list() {
		resp.Sandboxes = append(resp.Sandboxes, ob.status())
	}
	return resp, nil
}

func (s *service) WatchSandboxes(ctx context.Context, _ *hostagent.WatchSandboxesRequest, stream *connect.ServerStream[hostagent.WatchSandboxesResponse]) error {
	ends, stop := s.agent.ended.watch()
	defer stop()
	heartbeat := time.NewTicker(heartbeatInterval)
	defer heartbeat.Stop()
	msg := &hostagent.WatchSandboxesResponse{}
	for {
		if err := stream.Send(msg); err != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-s.agent.ctx.Done():
			return connect.NewError(connect.CodeUnavailable, errors.New("the host agent is shutting down"))
		case <-heartbeat.C:
			msg = &hostagent.WatchSandboxesResponse{}
		case ob, ok := <-ends:
			if !ok {
				return connect.NewError(connect.CodeResourceExhausted, errors.New("too far behind; list anew"))
			}
			msg = &hostagent.WatchSandboxesResponse{Ended: ob.status()}
		}
	}
}

func (s *service) GetMetrics(_ context.Context, req *hostagent.GetMetricsRequest) (*hostagent.GetMetricsResponse, error) {
	resp := &hostagent.GetMetricsResponse{Series: make(map[string]*hostagent.MetricSeries)}
	for _, id := range req.GetSandboxIds() {
		m := s.agent.get(sandbox.ID(id))
		if m == nil {
			continue
		}
		m.mu.Lock()
		samples := append(series(nil), m.samples...)
		m.mu.Unlock()
		out := &hostagent.MetricSeries{}
		for _, v := range samples {
			if (req.Start != nil && v.time.Before(req.Start.AsTime())) || (req.End != nil && v.time.After(req.End.AsTime())) {
				continue
			}
			out.Samples = append(out.Samples, v.message())
		}
		if n := len(out.Samples); req.GetLatestOnly() && n > 0 {
			out.Samples = out.Samples[n-1:]
		}
		resp.Series[id] = out
	}
	return resp, nil
}

func (s *service) GetLogs(_ context.Context, req *hostagent.GetLogsRequest) (*hostagent.GetLogsResponse, error) {
	var entries []guest.LogEntry
	id := sandbox.ID(req.GetSandboxId())
	if m := s.agent.get(id); m != nil {
		s.agent.pullLogs(m, sampleLimit)
		m.mu.Lock()
		entries = append(entries, m.logs.entries...)
		m.mu.Unlock()
	} else if ob, ok := s.agent.ended.find(id); ok {
		entries = ob.Logs
	} else {
		return nil, rpcError(sandbox.Errorf(sandbox.ErrNotFound, "no logs are kept of sandbox %s", id))
	}
	resp := &hostagent.GetLogsResponse{}
	for _, e := range entries {
		if req.After != nil && !e.Time.After(req.After.AsTime()) {
			continue
		}
		resp.Entries = append(resp.Entries, &hostagent.LogEntry{
			Time: timestamppb.New(e.Time), Level: e.Level, Message: e.Message, Fields: e.Fields,
		})
	}
	return resp, nil
}

func (ob obituary) status() *hostagent.SandboxStatus {
	return &hostagent.SandboxStatus{
		SandboxId: string(ob.ID), State: string(ob.State), Reason: ob.Reason, ChangedAt: timestamppb.New(ob.Time),
	}
}

func (v sample) message() *hostagent.MetricSample {
	return &hostagent.MetricSample{
		Time: timestamppb.New(v.time), CpuCount: int32(v.CPUCount), CpuUsedPct: v.CPUUsedPct,
		MemUsed: v.MemUsed, MemTotal: v.MemTotal, MemCache: v.MemCache,
		DiskUsed: v.DiskUsed, DiskTotal: v.DiskTotal,
	}
}
