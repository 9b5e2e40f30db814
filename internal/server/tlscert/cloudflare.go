package tlscert

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strings"
	"time"

	"github.com/libdns/libdns"
)

const (
	cloudflareAPI = "https://api.cloudflare.com/client/v4"
	// Answers are a few hundred bytes.
	maxCloudflareAnswer = 1 << 20
)

// cloudflare changes zones that Cloudflare hosts, by its API.
type cloudflare struct {
	api    string // base URL
	token  string
	client *http.Client
}

func newCloudflare() (DNSProvider, error) {
	token, err := setting("CLOUDFLARE_API_TOKEN")
	if err != nil {
		return nil, err
	}
	if token == "" {
		return nil, errors.New("set CLOUDFLARE_API_TOKEN to a token that may edit the zone's DNS (permissions Zone:Read and DNS:Edit)")
	}
	return newCloudflareAt(cloudflareAPI, token), nil
}

func newCloudflareAt(api, token string) *cloudflare {
	return &cloudflare{api: api, token: token, client: &http.Client{
		Timeout:   30 * time.Second,
		Transport: &http.Transport{Proxy: http.ProxyFromEnvironment, ForceAttemptHTTP2: true, IdleConnTimeout: 10 * time.Second},
	}}
}

// cloudflareRecord is a record in the API's shape.
type cloudflareRecord struct {
	ID      string `json:"id,omitempty"`
	Type    string `json:"type"`
	Name    string `json:"name"`
	Content string `json:"content"`
	TTL     int    `json:"ttl"` // seconds, 60 at least
}

// AppendRecords implements libdns.RecordAppender, for TXT records.
func (p *cloudflare) AppendRecords(ctx context.Context, zone string, records []libdns.Record) ([]libdns.Record, error) {
	zoneID, err := p.zoneID(ctx, zone)
	if err != nil {
		return nil, err
	}
	var made []libdns.Record
	for _, record := range records {
		r := record.RR()
		if r.Type != "TXT" {
			return made, fmt.Errorf("cannot make %s records", r.Type)
		}
		var answer cloudflareRecord
		err := p.call(ctx, http.MethodPost, "/zones/"+zoneID+"/dns_records", cloudflareRecord{
			Type: r.Type, Name: absoluteName(r.Name, zone), Content: `"` + r.Data + `"`,
			TTL: max(60, int(r.TTL/time.Second)),
		}, &answer)
		if err != nil {
			return made, err
		}
		made = append(made, libdns.TXT{Name: r.Name, TTL: r.TTL, Text: r.Data, ProviderData: answer.ID})
	}
	return made, nil
}

// DeleteRecords implements libdns.RecordDeleter, for records of AppendRecords.
func (p *cloudflare) DeleteRecords(ctx context.Context, zone string, records []libdns.Record) ([]libdns.Record, error) {
	zoneID, err := p.zoneID(ctx, zone)
	if err != nil {
		return nil, err
	}
	var gone []libdns.Record
	for _, record := range records {
		txt, ok := record.(libdns.TXT)
		id, known := txt.ProviderData.(string)
		if !ok || !known || id == "" {
			return gone, fmt.Errorf("record %s is not one that was made here", record.RR().Name)
		}
		if err := p.call(ctx, http.MethodDelete, "/zones/"+zoneID+"/dns_records/"+url.PathEscape(id), nil, nil); err != nil {
			return gone, err
		}
		gone = append(gone, record)
	}
	return gone, nil
}

func absoluteName(name, zone string) string {
	return strings.TrimSuffix(libdns.AbsoluteName(name, zone), ".")
}

func (p *cloudflare) zoneID(ctx context.Context, zone string) (string, error) {
	zone = strings.TrimSuffix(zone, ".")
	var zones []struct {
		ID string `json:"id"`
	}
	if err := p.call(ctx, http.MethodGet, "/zones?name="+url.QueryEscape(zone), nil, &zones); err != nil {
		return "", err
	}
	if len(zones) != 1 {
		return "", fmt.Errorf("cloudflare: the token sees no zone %s: it needs Zone:Read and DNS:Edit for it", zone)
	}
	return url.PathEscape(zones[0].ID), nil
}

// call sends one request and reads the result of the answer into result.
func (p *cloudflare) call(ctx context.Context, method, path string, body, result any) error {
	var payload io.Reader
	if body != nil {
		data, err := json.Marshal(body)
		if err != nil {
			return fmt.Errorf("cloudflare: %w", err)
		}
		payload = bytes.NewReader(data)
	}
	req, err := http.NewRequestWithContext(ctx, method, p.api+path, payload)
	if err != nil {
		return fmt.Errorf("cloudflare: %w", err)
	}
	req.Header.Set("Authorization", "Bearer "+p.token)
	req.Header.Set("Content-Type", "application/json")
	resp, err := p.client.Do(req)
	if err != nil {
		return fmt.Errorf("cloudflare: %w", err)
	}
	defer resp.Body.Close()
	var answer struct {
		Success bool `json:"success"`
		Errors  []struct {
			Code    int    `json:"code"`
			Message string `json:"message"`
		} `json:"errors"`
		Result json.RawMessage `json:"result"`
	}
	if err := json.NewDecoder(io.LimitReader(resp.Body, maxCloudflareAnswer)).Decode(&answer); err != nil {
		return fmt.Errorf("cloudflare: %s: %w", resp.Status, err)
	}
	if !answer.Success {
		var reasons []string
		for _, e := range answer.Errors {
			reasons = append(reasons, fmt.Sprintf("%s (%d)", e.Message, e.Code))
		}
		return fmt.Errorf("cloudflare: %s: %s", resp.Status, strings.Join(reasons, "; "))
	}
	if result == nil {
		return nil
	}
	if err := json.Unmarshal(answer.Result, result); err != nil {
		return fmt.Errorf("cloudflare: %w", err)
	}
	return nil
}
